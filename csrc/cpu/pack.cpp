// pack on the CPU: the kept candidates of each image as rows of one tensor.
#include <algorithm>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "../pack.h"

namespace yolov4_fast {
namespace {

constexpr int64_t COLUMNS = 6;

Tensor pack_cpu(
    const Tensor& boxes_in, const Tensor& scores_in, const Tensor& class_ids_in, const Tensor& counts_in,
    const Tensor& keep_in, const Tensor& kept_in) {
  const auto check_device = [](const Tensor& tensor, const char* name) { check_cpu(tensor, name); };
  check_pack(boxes_in, scores_in, class_ids_in, counts_in, keep_in, kept_in, check_device);
  const int64_t batch = boxes_in.size(0), candidates = boxes_in.size(1), detections = keep_in.size(1);
  const Tensor boxes_tensor = torch::stable::contiguous(boxes_in);          // [B, K, 4]
  const Tensor scores_tensor = torch::stable::contiguous(scores_in);        // [B, K]
  const Tensor class_ids_tensor = torch::stable::contiguous(class_ids_in);  // [B, K]
  const Tensor counts_tensor = torch::stable::contiguous(counts_in);        // [B]
  const Tensor keep_tensor = torch::stable::contiguous(keep_in);            // [B, D]
  const Tensor kept_tensor = torch::stable::contiguous(kept_in);            // [B]
  const float* const boxes = boxes_tensor.const_data_ptr<float>();
  const float* const scores = scores_tensor.const_data_ptr<float>();
  const int32_t* const class_ids = class_ids_tensor.const_data_ptr<int32_t>();
  const int32_t* const counts = counts_tensor.const_data_ptr<int32_t>();
  const int64_t* keep = keep_tensor.const_data_ptr<int64_t>();
  const int32_t* const kept = kept_tensor.const_data_ptr<int32_t>();
  Tensor packed_tensor = torch::stable::empty({batch, detections + 1, COLUMNS}, ScalarType::Float);
  float* packed = packed_tensor.mutable_data_ptr<float>();
  std::fill_n(packed, batch * (detections + 1) * COLUMNS, 0.0f);
  for (int64_t b = 0; b < batch; ++b, keep += detections, packed += (detections + 1) * COLUMNS) {
    STD_TORCH_CHECK(
        kept[b] >= 0 && kept[b] <= detections, "kept must be in 0..", detections, ", not ", kept[b], " of image ", b);
    packed[0] = static_cast<float>(kept[b]);
    packed[1] = static_cast<float>(counts[b]);
    for (int64_t row = 0; row < kept[b]; ++row) {
      STD_TORCH_CHECK(
          keep[row] >= 0 && keep[row] < candidates, "keep must be in 0..", candidates - 1, " for what is kept, not ",
          keep[row], " of image ", b);
      const int64_t candidate = b * candidates + keep[row];
      float* const out = packed + (row + 1) * COLUMNS;
      std::copy_n(boxes + 4 * candidate, 4, out);
      out[4] = scores[candidate];
      out[5] = static_cast<float>(class_ids[candidate]);
    }
  }
  return packed_tensor;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov4_fast, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack_cpu));
}

}  // namespace yolov4_fast
