// The launches of the CUDA kernels. Only this file is compiled by nvcc, without torch's headers. Callers have set the
// device in torch's copy of CUDA's runtime; this library has a copy of its own, which is told again.
#include <cuda_runtime.h>

#include "diou_nms.cuh"
#include "launcher.cuh"
#include "pack.cuh"

namespace yolov4_fast {

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
