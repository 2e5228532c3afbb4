// What pack's kernel reads and writes, and how it is launched. Free of torch and of CUDA's headers.
#pragma once

#include <cstdint>

namespace yolov4_fast {

struct Pack {
  const float* boxes;        // [B, K, 4]
  const float* scores;       // [B, K]
  const int32_t* class_ids;  // [B, K]
  const int32_t* counts;     // [B]
  const int64_t* keep;       // [B, D]
  const int32_t* kept;       // [B]
  float* packed;             // [B, D + 1, 6]
  int64_t batch, candidates, detections;
};

// Enqueue on a cudaStream_t of the device; null, or what went wrong.
const char* launch_pack(const Pack& pack, int device, void* stream);

}  // namespace yolov4_fast
