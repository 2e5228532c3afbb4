// Checks of pack's arguments, the same for every device.
#pragma once

#include <cstdint>

#include "checks.h"

namespace yolov4_fast {

// check_device(tensor, name) refuses a tensor of another device than the implementation's.
template <typename CheckDevice>
void check_pack(
    const Tensor& boxes, const Tensor& scores, const Tensor& class_ids, const Tensor& counts, const Tensor& keep,
    const Tensor& kept, const CheckDevice& check_device) {
  check_device(boxes, "boxes");
  check_device(scores, "scores");
  check_device(class_ids, "class_ids");
  check_device(counts, "counts");
  check_device(keep, "keep");
  check_device(kept, "kept");
  check_dtype(boxes, ScalarType::Float, "boxes");
  check_dtype(scores, ScalarType::Float, "scores");
  check_dtype(class_ids, ScalarType::Int, "class_ids");
  check_dtype(counts, ScalarType::Int, "counts");
  check_dtype(keep, ScalarType::Long, "keep");
  check_dtype(kept, ScalarType::Int, "kept");
  STD_TORCH_CHECK(
      boxes.dim() == 3 && boxes.size(2) == 4, "boxes must be [batch, candidates, 4], not ", shape_of(boxes));
  const int64_t batch = boxes.size(0), candidates = boxes.size(1);
  check_shape(scores, {batch, candidates}, "scores");
  check_shape(class_ids, {batch, candidates}, "class_ids");
  check_shape(counts, {batch}, "counts");
  STD_TORCH_CHECK(
      keep.dim() == 2 && keep.size(0) == batch, "keep must be [", batch, ", detections], not ", shape_of(keep));
  check_shape(kept, {batch}, "kept");
}

}  // namespace yolov4_fast
