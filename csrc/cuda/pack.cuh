// pack on the GPU: a thread for each number of the result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pack.h"

namespace yolov4_fast {

constexpr int64_t PACK_COLUMNS = 6;
constexpr int32_t PACK_BLOCK = 256;              // threads
constexpr int64_t PACK_MOST_BLOCKS = 1 << 20;  // each thread takes several numbers of a larger result

__device__ inline float packed_value(const Pack& pack, int64_t image, int64_t row, int64_t column) {
  const int64_t kept = pack.kept[image];
  if (row == 0) {
    return column == 0 ? static_cast<float>(kept) : (column == 1 ? static_cast<float>(pack.counts[image]) : 0.0f);
  }
  if (row > kept) {
    return 0.0f;
  }
  const int64_t position = pack.keep[image * pack.detections + row - 1];
  if (position < 0 || position >= pack.candidates) {
    return __int_as_float(0x7fc00000);  // NaN: a kernel cannot raise, and must not read what is not there
  }
  const int64_t candidate = image * pack.candidates + position;
  if (column < 4) {
    return pack.boxes[4 * candidate + column];
  }
  return column == 4 ? pack.scores[candidate] : static_cast<float>(pack.class_ids[candidate]);
}

__global__ void __launch_bounds__(PACK_BLOCK) pack_kept(const Pack pack) {
  const int64_t per_image = (pack.detections + 1) * PACK_COLUMNS;
  const int64_t count = pack.batch * per_image;
  const int64_t step = static_cast<int64_t>(gridDim.x) * PACK_BLOCK;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * PACK_BLOCK + threadIdx.x; i < count; i += step) {
    const int64_t image = i / per_image, inside = i % per_image;
    pack.packed[i] = packed_value(pack, image, inside / PACK_COLUMNS, inside % PACK_COLUMNS);
  }
}

// Starts the kernel by launch(kernel, grid, threads of a block, bytes of shared memory, arguments...).
template <typename Launch>
void enqueue_pack(const Pack& pack, const Launch& launch) {
  const int64_t count = pack.batch * (pack.detections + 1) * PACK_COLUMNS;
  const int64_t blocks = std::min((count + PACK_BLOCK - 1) / PACK_BLOCK, PACK_MOST_BLOCKS);
  launch(pack_kept, dim3(static_cast<unsigned>(blocks)), PACK_BLOCK, size_t{0}, pack);
}

}  // namespace yolov4_fast
