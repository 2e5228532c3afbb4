// Schema of diou_nms; the definition is in yolov4_fast/ops/diou_nms.py, implementations in cpu/ and cuda/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(yolov4_fast, m) {
  m.def(
      "diou_nms(Tensor boxes, Tensor scores, Tensor class_ids, Tensor counts, float iou_threshold, "
      "float? beta=None, int max_detections=0, Tensor? numbers=None) -> (Tensor keep, Tensor kept)");
}
