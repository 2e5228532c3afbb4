// The launches of the plugin's kernels. TensorRT has made the device and its context current; this library has a copy
// of CUDA's runtime of its own, which takes the thread's current context.
#include <cuda_runtime.h>

#include "../cuda/launcher.cuh"
#include "detect.cuh"

namespace yolov4_fast {

const char* launch_detect(const Detect& detect, void* stream) {
  static_assert(sizeof(Detect) <= 4096, "what a kernel takes as arguments");
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) {
    return message(error);
  }
  enqueue_detect(detect, multiprocessors, launcher(stream));
  return message(cudaGetLastError());
}

}  // namespace yolov4_fast
