// pack for CUDA tensors; the kernel is in pack.cuh.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../pack.h"
#include "device.h"
#include "pack.h"

namespace yolov4_fast {
namespace {

Tensor pack_cuda(
    const Tensor& boxes_in, const Tensor& scores_in, const Tensor& class_ids_in, const Tensor& counts_in,
    const Tensor& keep_in, const Tensor& kept_in) {
  check_pack(boxes_in, scores_in, class_ids_in, counts_in, keep_in, kept_in, check_same_gpu(boxes_in));
  const int64_t batch = boxes_in.size(0), candidates = boxes_in.size(1), detections = keep_in.size(1);
  const torch::stable::accelerator::DeviceGuard guard(boxes_in.get_device_index());
  const Tensor boxes = torch::stable::contiguous(boxes_in);          // [B, K, 4]
  const Tensor scores = torch::stable::contiguous(scores_in);        // [B, K]
  const Tensor class_ids = torch::stable::contiguous(class_ids_in);  // [B, K]
  const Tensor counts = torch::stable::contiguous(counts_in);        // [B]
  const Tensor keep = torch::stable::contiguous(keep_in);            // [B, D]
  const Tensor kept = torch::stable::contiguous(kept_in);            // [B]
  Tensor packed = torch::stable::new_empty(boxes, {batch, detections + 1, 6}, ScalarType::Float);
  if (batch == 0) {
    return packed;
  }
  const Pack pack{
      boxes.const_data_ptr<float>(),
      scores.const_data_ptr<float>(),
      class_ids.const_data_ptr<int32_t>(),
      counts.const_data_ptr<int32_t>(),
      keep.const_data_ptr<int64_t>(),
      kept.const_data_ptr<int32_t>(),
      packed.mutable_data_ptr<float>(),
      batch,
      candidates,
      detections};
  const char* const error = launch_pack(pack, boxes.get_device_index(), current_stream(boxes));
  STD_TORCH_CHECK(!error, "pack did not start on cuda:", boxes.get_device_index(), ": ", error);
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov4_fast, CUDA, m) {
  m.impl("pack", TORCH_BOX(&pack_cuda));
}

}  // namespace yolov4_fast
