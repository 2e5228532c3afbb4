// diou_nms on the GPU: three kernels, a fixed launch, nothing that waits for the host.
//
//   order.cuh  order_candidates  ranks by score, places by class
//   pairs.cuh  find_suppressors  who would suppress whom, as bits
//   keep.cuh   keep_survivors    greedy suppression over the bits
//
// They use no <<<>>> and no header of CUDA: tests compile them for the CPU too, with fibers for threads.
#pragma once

#include <cstdint>

#include "diou_nms.h"
#include "keep.cuh"
#include "order.cuh"
#include "pairs.cuh"

namespace yolov4_fast {

// Starts the kernels in order by launch(kernel, grid, threads of a block, bytes of shared memory, arguments...).
template <typename Launch>
void enqueue_diou_nms(const DiouNms& nms, int64_t multiprocessors, const Launch& launch) {
  // More would have to be asked of the device first.
  static_assert(sizeof(OrderShared) <= 48 * 1024 && sizeof(KeepShared) <= 48 * 1024);
  const dim3 images(static_cast<unsigned>(nms.batch));
  launch(order_candidates, images, BLOCK, sizeof(OrderShared), nms);
  if (nms.candidates > 0) {
    const dim3 pairs(static_cast<unsigned>(pair_blocks(nms, multiprocessors)), static_cast<unsigned>(nms.batch));
    launch(find_suppressors, pairs, TILE, sizeof(PairShared), nms, certainly_not_bound(nms.criterion));
  }
  launch(keep_survivors, images, BLOCK, sizeof(KeepShared), nms);
}

}  // namespace yolov4_fast
