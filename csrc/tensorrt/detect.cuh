// Raw maps to detections on the GPU: six kernels, a fixed launch, nothing that waits for the host.
//
//   clear_counts       no candidates yet
//   decode_candidates  appends each image's candidates, in any order; `numbers` tells theirs
//   order_candidates, find_suppressors, keep_survivors    ../cuda/diou_nms.cuh
//   write_detections   gathers what was kept
//
// They use no <<<>>> and no header of CUDA: tests compile them for the CPU too, with fibers for threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../cuda/diou_nms.cuh"
#include "../decode.h"
#include "detect.h"
#include "half.h"

namespace yolov4_fast {

constexpr int32_t DETECT_BLOCK = 256;            // threads
constexpr int64_t WRITE_MOST_BLOCKS = 1 << 16;  // each thread takes several detections of a larger result

__global__ void __launch_bounds__(DETECT_BLOCK) clear_counts(const __grid_constant__ Detect detect) {
  const int64_t image = static_cast<int64_t>(blockIdx.x) * DETECT_BLOCK + threadIdx.x;
  if (image < detect.nms.batch) {
    detect.counts[image] = 0;
  }
}

// An anchor of a cell of a head.
template <typename Raw>
struct Pair {
  const DetectHead* head;  // null: there is none
  const Raw* values;       // tx; what follows lies a plane on each
  int32_t anchor, cell, number;  // number: of its first class

  __device__ float operator[](int32_t entry) const {
    return value_of(values[static_cast<int64_t>(entry) * head->cells()]);
  }
};

template <typename Raw>
__device__ inline Pair<Raw> pair_of(const Detect& detect, int64_t image, int32_t index) {
  int32_t local = index;
  for (int32_t i = 0; i < detect.head_count; ++i) {
    const DetectHead& head = detect.heads[i];
    if (local < head.pairs()) {
      const int32_t cells = head.cells();
      const int32_t anchor = local / cells, cell = local % cells;
      const int64_t plane = (image * head.anchors + anchor) * (5 + detect.classes);
      return {&head, static_cast<const Raw*>(head.raw) + plane * cells + cell, anchor, cell, index * detect.classes};
    }
    local -= head.pairs();
  }
  return {nullptr, nullptr, 0, 0, 0};
}

// False where a corner is not finite.
template <typename Raw>
__device__ inline bool box_of(const Pair<Raw>& pair, float4& box) {
  const DetectHead& head = *pair.head;
  const bool new_coords = head.new_coords != 0;
  const Extent x = extent_of(
      pair[0], pair[2], head.scale_x_y, new_coords, pair.cell % head.width, head.width, head.sizes[2 * pair.anchor]);
  const Extent y = extent_of(
      pair[1], pair[3], head.scale_x_y, new_coords, pair.cell / head.width, head.height,
      head.sizes[2 * pair.anchor + 1]);
  box = float4{
      static_cast<float>(x.begin), static_cast<float>(y.begin), static_cast<float>(x.end), static_cast<float>(y.end)};
  return is_finite(box.x) && is_finite(box.y) && is_finite(box.z) && is_finite(box.w);
}

// A warp's work on one pair: a class a lane.
template <typename Raw>
__device__ inline void append_candidates(const Detect& detect, int64_t image, const Pair<Raw>& pair) {
  const bool new_coords = pair.head->new_coords != 0;
  const int32_t lane = threadIdx.x % WARP;
  const double objectness = probability(pair[4], new_coords);
  if (!(static_cast<float>(objectness) > detect.confidence)) {
    return;
  }
  bool has_box = false;
  float4 box{0, 0, 0, 0};
  for (int32_t chunk = 0; chunk < detect.classes; chunk += WARP) {
    const int32_t class_id = chunk + lane;
    float score = 0;
    if (class_id < detect.classes) {
      score = static_cast<float>(objectness * probability(pair[5 + class_id], new_coords));
    }
    const bool hit = class_id < detect.classes && score > detect.confidence;
    const uint32_t hits = __ballot_sync(ALL_LANES, hit);
    if (!hits) {
      continue;
    }
    if (!has_box && !box_of(pair, box)) {
      return;
    }
    has_box = true;
    uint32_t first = 0;
    if (lane == 0) {
      first = atomicAdd(&detect.counts[image], static_cast<uint32_t>(__popc(hits)));
    }
    first = __shfl_sync(ALL_LANES, first, 0);
    if (hit) {
      const int64_t slot = image * detect.nms.candidates + first + __popc(hits & ((1u << lane) - 1));
      reinterpret_cast<float4*>(detect.candidate_boxes)[slot] = box;
      detect.candidate_scores[slot] = score;
      detect.candidate_classes[slot] = class_id;
      detect.candidate_numbers[slot] = pair.number + class_id;
    }
  }
}

// A pair a thread: only its objectness is read, and compared raw. What passes is looked at by the whole warp.
template <typename Raw>
__global__ void __launch_bounds__(DETECT_BLOCK) decode_candidates(const __grid_constant__ Detect detect) {
  const int64_t image = blockIdx.y;
  const int32_t thread = static_cast<int32_t>(threadIdx.x), lane = thread % WARP;
  const int32_t first = static_cast<int32_t>(blockIdx.x) * DETECT_BLOCK + thread - lane;
  const Pair<Raw> own = pair_of<Raw>(detect, image, first + lane);
  uint32_t open = __ballot_sync(ALL_LANES, own.head && own[4] > own.head->bound);  // NaN is not over it
  while (open) {
    const int32_t next = __ffs(static_cast<int>(open)) - 1;
    open &= open - 1;
    append_candidates(detect, image, pair_of<Raw>(detect, image, first + next));
  }
}

__global__ void __launch_bounds__(DETECT_BLOCK) write_detections(const __grid_constant__ Detect detect) {
  const DiouNms& nms = detect.nms;
  const int64_t step = static_cast<int64_t>(gridDim.x) * DETECT_BLOCK;
  int64_t i = static_cast<int64_t>(blockIdx.x) * DETECT_BLOCK + threadIdx.x;
  for (; i < nms.batch * nms.detections; i += step) {
    const int64_t image = i / nms.detections;
    const bool is_used = i % nms.detections < nms.kept[image];
    const int64_t candidate = image * nms.candidates + (is_used ? nms.keep[i] : 0);
    float4 box{0, 0, 0, 0};
    if (is_used) {
      box = reinterpret_cast<const float4*>(nms.boxes)[candidate];
    }
    float* const out = detect.boxes + 4 * i;
    out[0] = box.x;
    out[1] = box.y;
    out[2] = box.z;
    out[3] = box.w;
    detect.scores[i] = is_used ? nms.scores[candidate] : 0.0f;
    detect.class_ids[i] = is_used ? nms.class_ids[candidate] : -1;
  }
}

// Starts the kernels in order by launch(kernel, grid, threads of a block, bytes of shared memory, arguments...).
template <typename Launch>
void enqueue_detect(const Detect& detect, int64_t multiprocessors, const Launch& launch) {
  const auto blocks_for = [](int64_t count) {
    return static_cast<unsigned>((count + DETECT_BLOCK - 1) / DETECT_BLOCK);
  };
  const int64_t batch = detect.nms.batch;
  launch(clear_counts, dim3(blocks_for(batch)), DETECT_BLOCK, size_t{0}, detect);
  const dim3 grid(blocks_for(detect.pairs()), static_cast<unsigned>(batch));
  switch (detect.type) {
    case MapType::float32:
      launch(decode_candidates<float>, grid, DETECT_BLOCK, size_t{0}, detect);
      break;
    case MapType::float16:
      launch(decode_candidates<Half>, grid, DETECT_BLOCK, size_t{0}, detect);
      break;
    case MapType::bfloat16:
      launch(decode_candidates<Bfloat>, grid, DETECT_BLOCK, size_t{0}, detect);
      break;
  }
  enqueue_diou_nms(detect.nms, multiprocessors, launch);
  const int64_t blocks = std::min<int64_t>(blocks_for(batch * detect.nms.detections), WRITE_MOST_BLOCKS);
  launch(write_detections, dim3(static_cast<unsigned>(blocks)), DETECT_BLOCK, size_t{0}, detect);
}

}  // namespace yolov4_fast
