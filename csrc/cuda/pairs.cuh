// diou_nms, second kernel: which candidates would suppress which; a block a tile of 64 places and a phase of its work.
//
// A word of 64 bits per candidate and tile tells which of the tile, before it and of its class, would suppress it. A
// tile meets earlier ones only as far back as its first class reaches. Nearly every pair is decided in single
// precision, with margins; the rest in double, as on the CPU.
#pragma once

#include <cstdint>

#include "block.cuh"
#include "diou_nms.h"

namespace yolov4_fast {

struct PairShared {
  float4 boxes[TILE];
  int32_t classes[TILE];
};

__device__ inline float area(float4 box) { return (box.z - box.x) * (box.w - box.y); }

// Whether `a` suppresses `b`. The tests in single precision only decide what they can for certain.
struct Suppression {
  Criterion criterion;
  float not_up_to;  // IoU; the same bound, on the same formula, as on the CPU
  float certain_over;

  // The float penalty (d/c)^(2 beta) is off by less than 1e-5 if 2 beta is in 1..8 (its slope in d/c, which is at most
  // 1 and off by less than 1e-6, is then at most 8; powf's own error is a few units in the last place) and c^2 is in
  // the range of normal numbers; the IoU by less than 1e-6. So ten times that decides.
  __device__ explicit Suppression(const Criterion& c, float bound)
      : criterion(c),
        not_up_to(bound),
        certain_over(
            !c.has_penalty || (c.beta >= 0.5 && c.beta <= 4) ? static_cast<float>(c.iou_threshold) + 1e-4f : 2.0f) {}

  __device__ bool operator()(float4 a, float4 b) const {
    const float width = fminf(b.z, a.z) - fmaxf(b.x, a.x);
    const float height = fminf(b.w, a.w) - fmaxf(b.y, a.y);
    const float intersection = width * height;
    const float all = area(b) + area(a) - intersection;
    if (!(width > 0.0f && height > 0.0f && intersection + TINY > not_up_to * all)) {
      return false;
    }
    return is_certain(a, b, intersection, all) || suppresses(&a.x, &b.x, criterion);
  }

 private:
  __device__ bool is_certain(float4 a, float4 b, float intersection, float all) const {
    const float iou = intersection / all;
    if (!(iou > certain_over && intersection > TINY)) {
      return false;
    }
    if (!criterion.has_penalty) {
      return true;
    }
    // Differences before sums: the corners lie close to each other, far from zero.
    const float dx = ((a.x - b.x) + (a.z - b.z)) * 0.5f, dy = ((a.y - b.y) + (a.w - b.w)) * 0.5f;
    const float cx = fmaxf(a.z, b.z) - fminf(a.x, b.x), cy = fmaxf(a.w, b.w) - fminf(a.y, b.y);
    const float diagonal = cx * cx + cy * cy;
    const float penalty = powf((dx * dx + dy * dy) / diagonal, static_cast<float>(criterion.beta));
    return diagonal < 1e37f && iou - penalty > certain_over;
  }
};

__global__ void __launch_bounds__(TILE) find_suppressors(const DiouNms nms, float not_up_to) {
  PairShared& shared = *reinterpret_cast<PairShared*>(shared_memory);
  const int64_t image = blockIdx.y;
  const int64_t row = image * nms.capacity();
  const int32_t ranked = nms.ranked[image];
  const int32_t tiles = (ranked + TILE - 1) / TILE;
  const int32_t* const classes = nms.classes + row;
  const float4* const boxes = reinterpret_cast<const float4*>(nms.sorted_boxes) + row;
  uint64_t* const suppressors = nms.suppressors + image * nms.words();
  const Suppression suppresses(nms.criterion, not_up_to);
  for (int32_t unit = blockIdx.x; unit < tiles * PHASES; unit += gridDim.x) {
    const int32_t tile = tiles - 1 - unit / PHASES;  // those with most before them first
    const int32_t place = tile * TILE + static_cast<int32_t>(threadIdx.x);
    const bool is_used = place < ranked;
    const float4 box = is_used ? boxes[place] : float4{0, 0, 0, 0};
    const int32_t class_id = is_used ? classes[place] : 0;
    const int32_t first_class = classes[tile * TILE];
    for (int32_t earlier = tile - unit % PHASES; earlier >= 0; earlier -= PHASES) {
      if (earlier < tile && classes[earlier * TILE + TILE - 1] != first_class) {
        break;
      }
      const int32_t other = earlier * TILE + static_cast<int32_t>(threadIdx.x);
      __syncthreads();  // nobody reads the tile before
      if (other < ranked) {
        shared.boxes[threadIdx.x] = boxes[other];
        shared.classes[threadIdx.x] = classes[other];
      }
      __syncthreads();
      const int32_t count = !is_used ? 0 : (earlier == tile ? static_cast<int32_t>(threadIdx.x) : TILE);
      uint64_t word = 0;
      for (int32_t i = 0; i < count; ++i) {
        if (shared.classes[i] == class_id && suppresses(shared.boxes[i], box)) {
          word |= uint64_t{1} << i;
        }
      }
      if (is_used) {
        suppressors[nms.suppressor(earlier, place)] = word;
      }
    }
  }
}

}  // namespace yolov4_fast
