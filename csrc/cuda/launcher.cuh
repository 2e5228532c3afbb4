// How the host starts kernels; only for nvcc.
#pragma once

#include <cuda_runtime.h>

namespace yolov4_fast {

// Null, or what is wrong.
inline const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

inline auto launcher(void* stream) {
  return [stream](auto kernel, dim3 grid, int threads, size_t shared_bytes, const auto&... arguments) {
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  };
}

}  // namespace yolov4_fast
