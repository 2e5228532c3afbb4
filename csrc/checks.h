// Checks of arguments, with the actual value in the message. Python validates first, with friendlier words; these
// guard torch.ops.yolov4_fast.* called directly, where a wrong shape would mean reading foreign memory.
#pragma once

#include <string>

#include <torch/csrc/stable/tensor.h>

namespace yolov4_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

inline void check_dtype(const Tensor& tensor, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype), ", not ",
      torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_shape(const Tensor& tensor, std::initializer_list<int64_t> shape, const char* name) {
  bool equal = tensor.dim() == static_cast<int64_t>(shape.size());
  std::string expected;
  int64_t i = 0;
  for (int64_t size : shape) {
    equal = equal && tensor.size(i++) == size;
    expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  }
  STD_TORCH_CHECK(equal, name, " must be [", expected, "], not ", shape_of(tensor));
}

inline void check_cpu(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU like the other arguments");
}

}  // namespace yolov4_fast
