// Checks of diou_nms's arguments, the same for every device.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "checks.h"

namespace yolov4_fast {

// check_device(tensor, name) refuses a tensor of another device than the implementation's.
template <typename CheckDevice>
void check_diou_nms(
    const Tensor& boxes, const Tensor& scores, const Tensor& class_ids, const Tensor& counts, double iou_threshold,
    std::optional<double> beta, int64_t max_detections, const std::optional<Tensor>& numbers,
    const CheckDevice& check_device) {
  check_device(boxes, "boxes");
  check_device(scores, "scores");
  check_device(class_ids, "class_ids");
  check_device(counts, "counts");
  check_dtype(boxes, ScalarType::Float, "boxes");
  check_dtype(scores, ScalarType::Float, "scores");
  check_dtype(class_ids, ScalarType::Int, "class_ids");
  check_dtype(counts, ScalarType::Int, "counts");
  STD_TORCH_CHECK(
      boxes.dim() == 3 && boxes.size(2) == 4, "boxes must be [batch, candidates, 4], not ", shape_of(boxes));
  const int64_t batch = boxes.size(0), candidates = boxes.size(1);
  check_shape(scores, {batch, candidates}, "scores");
  check_shape(class_ids, {batch, candidates}, "class_ids");
  check_shape(counts, {batch}, "counts");
  if (numbers) {
    check_device(*numbers, "numbers");
    check_dtype(*numbers, ScalarType::Int, "numbers");
    check_shape(*numbers, {batch, candidates}, "numbers");
  }
  STD_TORCH_CHECK(
      candidates <= std::numeric_limits<int32_t>::max(), "at most 2^31 - 1 candidates an image, not ", candidates);
  STD_TORCH_CHECK(
      iou_threshold >= 0 && iou_threshold <= 1, "iou_threshold must be in 0..1, not ", iou_threshold);
  STD_TORCH_CHECK(!beta || (*beta >= 0 && std::isfinite(*beta)), "beta must be finite and at least 0, not ", *beta);
  STD_TORCH_CHECK(max_detections >= 0, "max_detections must be at least 0, not ", max_detections);
}

}  // namespace yolov4_fast
