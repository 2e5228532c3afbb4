// What the threads of a block do together: share memory, sum, sort.
#pragma once

#include <cstdint>

namespace yolov4_fast {

constexpr int32_t BLOCK = 1024;  // threads of a block that works on one image
constexpr int32_t WARP = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;

extern __shared__ __align__(16) unsigned char shared_memory[];

__device__ inline uint32_t inclusive_scan_of_warp(uint32_t value) {
  const int32_t lane = threadIdx.x % WARP;
  for (int32_t distance = 1; distance < WARP; distance *= 2) {
    const uint32_t other = __shfl_up_sync(ALL_LANES, value, distance);
    value += lane >= distance ? other : 0;
  }
  return value;
}

// The sum of `value` over the threads before this one. sums: [WARP] shared, whose last then holds the sum of all; there
// must be a __syncthreads between two scans. Every thread of the block takes part.
__device__ inline uint32_t exclusive_scan_of_block(uint32_t value, uint32_t* sums) {
  const int32_t warp = threadIdx.x / WARP;
  const uint32_t inclusive = inclusive_scan_of_warp(value);
  if (threadIdx.x % WARP == WARP - 1) {
    sums[warp] = inclusive;
  }
  __syncthreads();
  if (warp == 0) {
    sums[threadIdx.x] = inclusive_scan_of_warp(sums[threadIdx.x]);
  }
  __syncthreads();
  return inclusive - value + (warp ? sums[warp - 1] : 0);
}

// Bitonic sort of `size` elements (a power of two) in shared memory, ascending. exchange(low, high, ascending) swaps
// the elements low < high unless they are in that order already. Ends with all threads of the block in step.
template <typename Exchange>
__device__ inline void sort_in_block(uint32_t size, const Exchange& exchange) {
  __syncthreads();
  for (uint32_t run = 2; run <= size; run *= 2) {
    for (uint32_t stride = run / 2; stride > 0; stride /= 2) {
      for (uint32_t pair = threadIdx.x; pair < size / 2; pair += BLOCK) {
        const uint32_t low = (pair & ~(stride - 1)) * 2 + (pair & (stride - 1));
        exchange(low, low + stride, (low & run) == 0);
      }
      // Up to a stride of 32 the pairs of a warp lie in 64 elements that no other warp touches.
      const uint32_t next = stride > 1 ? stride / 2 : run;
      if (stride > WARP || next > WARP) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    }
  }
  __syncthreads();
}

__device__ inline uint32_t power_of_two_from(uint32_t value) {
  uint32_t power = 1;
  while (power < value) {
    power *= 2;
  }
  return power;
}

}  // namespace yolov4_fast
