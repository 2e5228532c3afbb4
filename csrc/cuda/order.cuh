// diou_nms, first kernel: the candidates of each image in order of score, and class by class; a block an image.
//
// Key of a candidate: 32 bits of descending score, then 32 of its number, so that no two are equal and the order never
// depends on the order of threads. More than MAX_CANDIDATES are cut to the best by radix selection. The keys are
// sorted, which gives the ranks; then (class, rank) are, so that each class is one run in order of score, and boxes and
// classes are written in that order, their places.
#pragma once

#include <cstdint>

#include "block.cuh"
#include "diou_nms.h"

namespace yolov4_fast {

constexpr uint64_t LAST_KEY = ~uint64_t{0};
constexpr uint32_t NAN_KEY = 0xffffffffu;  // after -inf, whose key is 0xff800000
constexpr int32_t DIGITS = 256;

struct OrderShared {
  uint64_t keys[MAX_CANDIDATES];
  uint16_t slots[MAX_CANDIDATES];  // where the candidate of a key lies: in `selected`, or in the input
  uint32_t histogram[DIGITS];
  uint32_t sums[WARP];
  uint32_t digit, before, inside;  // of a pass of the selection
  uint32_t count;
};

// An unsigned number that ascends as the score descends; -0 and 0 are equal.
__device__ inline uint32_t descending_key(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  if (score != score) {
    return NAN_KEY;
  }
  return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}

__device__ inline uint64_t key_of(const DiouNms& nms, int64_t image, int32_t position) {
  const int64_t at = image * nms.candidates + position;
  const int32_t number = nms.numbers ? nms.numbers[at] : position;
  return uint64_t{descending_key(nms.scores[at])} << 32 | (static_cast<uint32_t>(number) ^ 0x80000000u);
}

__device__ inline int32_t count_of(const DiouNms& nms, int64_t image) {
  const int64_t count = nms.counts[image];
  return static_cast<int32_t>(count < 0 ? 0 : (count < nms.candidates ? count : nms.candidates));
}

// The last key among the best MAX_CANDIDATES of `count` (more than those), a byte in each pass over the scores.
__device__ inline uint64_t last_selected_key(const DiouNms& nms, int64_t image, int32_t count, OrderShared& shared) {
  uint64_t prefix = 0;
  uint32_t wanted = MAX_CANDIDATES;
  for (int32_t shift = 56; shift >= 0; shift -= 8) {
    if (threadIdx.x < DIGITS) {
      shared.histogram[threadIdx.x] = 0;
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += BLOCK) {
      const uint64_t key = key_of(nms, image, static_cast<int32_t>(i));
      if ((key ^ prefix) >> shift >> 8 == 0) {
        atomicAdd(&shared.histogram[key >> shift & (DIGITS - 1)], 1u);
      }
    }
    __syncthreads();
    const uint32_t inside = threadIdx.x < DIGITS ? shared.histogram[threadIdx.x] : 0;
    const uint32_t before = exclusive_scan_of_block(inside, shared.sums);
    if (before < wanted && wanted <= before + inside) {  // one thread
      shared.digit = threadIdx.x;
      shared.before = before;
      shared.inside = inside;
    }
    __syncthreads();
    prefix |= uint64_t{shared.digit} << shift;
    wanted -= shared.before;
    if (wanted == shared.inside) {
      return prefix | ((uint64_t{1} << shift) - 1);
    }
  }
  return prefix;
}

// Fills keys and slots with the best MAX_CANDIDATES of `count`, in no order; their positions go to `selected`.
__device__ inline void select_best(
    const DiouNms& nms, int64_t image, int32_t count, int32_t* selected, OrderShared& shared) {
  const uint64_t last = last_selected_key(nms, image, count, shared);
  if (threadIdx.x == 0) {
    shared.count = 0;
  }
  for (int32_t slot = threadIdx.x; slot < MAX_CANDIDATES; slot += BLOCK) {
    shared.keys[slot] = LAST_KEY;
    shared.slots[slot] = static_cast<uint16_t>(slot);
    selected[slot] = 0;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < count; i += BLOCK) {
    const uint64_t key = key_of(nms, image, static_cast<int32_t>(i));
    if (key <= last) {
      const uint32_t slot = atomicAdd(&shared.count, 1u);
      if (slot < MAX_CANDIDATES) {  // always, unless numbers are given twice
        shared.keys[slot] = key;
        selected[slot] = static_cast<int32_t>(i);
      }
    }
  }
}

__global__ void __launch_bounds__(BLOCK) order_candidates(const DiouNms nms) {
  OrderShared& shared = *reinterpret_cast<OrderShared*>(shared_memory);
  const int64_t image = blockIdx.x;
  const int32_t count = count_of(nms, image);
  const int64_t row = image * nms.capacity();
  int32_t* const selected = count > MAX_CANDIDATES ? nms.selected + row : nullptr;
  const uint32_t size = power_of_two_from(count < MAX_CANDIDATES ? count : MAX_CANDIDATES);
  if (selected) {
    select_best(nms, image, count, selected, shared);
  } else {
    for (int32_t slot = threadIdx.x; slot < static_cast<int32_t>(size); slot += BLOCK) {
      shared.keys[slot] = slot < count ? key_of(nms, image, slot) : LAST_KEY;
      shared.slots[slot] = static_cast<uint16_t>(slot);
    }
  }
  sort_in_block(size, [&](uint32_t low, uint32_t high, bool ascending) {
    const uint64_t a = shared.keys[low], b = shared.keys[high];
    const uint16_t slot_a = shared.slots[low], slot_b = shared.slots[high];
    if ((a > b || (a == b && slot_a > slot_b)) == ascending) {  // equal keys: numbers given twice
      shared.keys[low] = b;
      shared.keys[high] = a;
      shared.slots[low] = slot_b;
      shared.slots[high] = slot_a;
    }
  });

  if (threadIdx.x == 0) {
    shared.count = 0;
  }
  __syncthreads();
  const auto is_ranked = [&](int32_t rank) {
    return rank < count && rank < MAX_CANDIDATES && static_cast<uint32_t>(shared.keys[rank] >> 32) != NAN_KEY;
  };
  for (int32_t rank = threadIdx.x; rank < static_cast<int32_t>(size); rank += BLOCK) {
    if (is_ranked(rank) && !is_ranked(rank + 1)) {  // one thread, or none
      shared.count = rank + 1;
    }
  }
  __syncthreads();
  const int32_t ranked = static_cast<int32_t>(shared.count);
  const uint32_t places = power_of_two_from(ranked);
  for (int32_t rank = threadIdx.x; rank < static_cast<int32_t>(places); rank += BLOCK) {
    uint64_t key = LAST_KEY;
    if (rank < ranked) {
      const int32_t slot = shared.slots[rank];
      const int32_t position = selected ? selected[slot] : slot;
      const uint32_t class_id = static_cast<uint32_t>(nms.class_ids[image * nms.candidates + position]);
      nms.positions[row + rank] = position;
      key = uint64_t{class_id} << 32 | static_cast<uint32_t>(rank);
    }
    shared.keys[rank] = key;
  }
  sort_in_block(places, [&](uint32_t low, uint32_t high, bool ascending) {
    const uint64_t a = shared.keys[low], b = shared.keys[high];
    if ((a > b) == ascending) {
      shared.keys[low] = b;
      shared.keys[high] = a;
    }
  });
  for (int32_t place = threadIdx.x; place < ranked; place += BLOCK) {
    const int32_t rank = static_cast<int32_t>(shared.keys[place]);
    const float* const box = nms.boxes + 4 * (image * nms.candidates + nms.positions[row + rank]);
    nms.ranks[row + place] = rank;
    nms.classes[row + place] = static_cast<int32_t>(shared.keys[place] >> 32);
    reinterpret_cast<float4*>(nms.sorted_boxes)[row + place] = float4{box[0], box[1], box[2], box[3]};
  }
  if (threadIdx.x == 0) {
    nms.ranked[image] = ranked;
  }
}

}  // namespace yolov4_fast
