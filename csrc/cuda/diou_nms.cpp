// diou_nms for CUDA tensors; the kernels are in diou_nms.cuh.
#include <limits>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../diou_nms.h"
#include "device.h"
#include "diou_nms.h"

namespace yolov4_fast {
namespace {

constexpr int64_t MOST_IMAGES = 65535;  // what CUDA allows a grid's second dimension

std::tuple<Tensor, Tensor> diou_nms_cuda(
    const Tensor& boxes_in, const Tensor& scores_in, const Tensor& class_ids_in, const Tensor& counts_in,
    double iou_threshold, std::optional<double> beta, int64_t max_detections, const std::optional<Tensor>& numbers_in) {
  check_diou_nms(
      boxes_in, scores_in, class_ids_in, counts_in, iou_threshold, beta, max_detections, numbers_in,
      check_same_gpu(boxes_in));
  const int64_t batch = boxes_in.size(0), candidates = boxes_in.size(1);
  STD_TORCH_CHECK(batch <= MOST_IMAGES, "at most ", MOST_IMAGES, " images at a time on a GPU, not ", batch);
  const torch::stable::accelerator::DeviceGuard guard(boxes_in.get_device_index());
  const Tensor boxes = torch::stable::contiguous(boxes_in);          // [B, K, 4]
  const Tensor scores = torch::stable::contiguous(scores_in);        // [B, K]
  const Tensor class_ids = torch::stable::contiguous(class_ids_in);  // [B, K]
  const Tensor counts = torch::stable::contiguous(counts_in);        // [B]
  std::optional<Tensor> numbers;
  if (numbers_in) {
    numbers = torch::stable::contiguous(*numbers_in);  // [B, K]
  }
  const int64_t rows = max_detections ? max_detections : candidates;
  Tensor keep = torch::stable::new_empty(boxes, {batch, rows}, ScalarType::Long);  // [B, D]
  Tensor kept = torch::stable::new_empty(boxes, {batch}, ScalarType::Int);         // [B]
  if (batch == 0) {
    return {keep, kept};
  }
  DiouNms nms{};
  nms.boxes = boxes.const_data_ptr<float>();
  nms.scores = scores.const_data_ptr<float>();
  nms.class_ids = class_ids.const_data_ptr<int32_t>();
  nms.counts = counts.const_data_ptr<int32_t>();
  nms.numbers = numbers ? numbers->const_data_ptr<int32_t>() : nullptr;
  nms.keep = keep.mutable_data_ptr<int64_t>();
  nms.kept = kept.mutable_data_ptr<int32_t>();
  nms.batch = batch;
  nms.candidates = candidates;
  nms.detections = rows;
  nms.criterion = {iou_threshold, beta.has_value(), beta.value_or(0)};
  const int64_t bytes = static_cast<int64_t>(place_workspace(nms, nullptr));
  Tensor workspace = torch::stable::new_empty(boxes, {bytes}, ScalarType::Byte);
  place_workspace(nms, workspace.mutable_data_ptr<uint8_t>());
  const char* const error = launch_diou_nms(nms, boxes.get_device_index(), current_stream(boxes));
  STD_TORCH_CHECK(!error, "diou_nms did not start on cuda:", boxes.get_device_index(), ": ", error);
  return {keep, kept};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov4_fast, CUDA, m) {
  m.impl("diou_nms", TORCH_BOX(&diou_nms_cuda));
}

}  // namespace yolov4_fast
