// What the CUDA operators share: checks of the device, its guard and its current stream, through torch's stable ABI.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

#include "../checks.h"

// Declared by torch only where USE_CUDA is defined, which stands for torch's own build.
extern "C" AOTI_TORCH_EXPORT AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace yolov4_fast {

// A function that refuses a tensor that does not lie on a GPU, the same as `first`.
inline auto check_same_gpu(const Tensor& first) {
  return [index = first.get_device_index()](const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.is_cuda(), name, " must be on the GPU like the other arguments");
    STD_TORCH_CHECK(
        tensor.get_device_index() == index, name, " must be on cuda:", index, " like the other arguments, not on cuda:",
        tensor.get_device_index());
  };
}

inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STD_TORCH_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
      "torch does not tell the current stream of cuda:", tensor.get_device_index());
  return stream;
}

}  // namespace yolov4_fast
