// The launches of the CUDA kernels. Only this file is compiled by nvcc, without torch's headers. Callers have set the
// device in torch's copy of CUDA's runtime; this library has a copy of its own, which is told again.
#include <cuda_runtime.h>

#include "diou_nms.cuh"
#include "pack.cuh"

namespace yolov4_fast {
namespace {

// Null, or what is wrong.
const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

auto launcher(void* stream) {
  return [stream](auto kernel, dim3 grid, int threads, size_t shared_bytes, const auto&... arguments) {
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  };
}

}  // namespace

const char* launch_diou_nms(const DiouNms& nms, int device, void* stream) {
  int multiprocessors = 0;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) {
    return message(error);
  }
  enqueue_diou_nms(nms, multiprocessors, launcher(stream));
  return message(cudaGetLastError());
}

const char* launch_pack(const Pack& pack, int device, void* stream) {
  if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess) {
    return message(error);
  }
  enqueue_pack(pack, launcher(stream));
  return message(cudaGetLastError());
}

}  // namespace yolov4_fast
