// Schema of pack; the definition is in yolov4_fast/ops/pack.py, implementations in cpu/ and cuda/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(yolov4_fast, m) {
  m.def(
      "pack(Tensor boxes, Tensor scores, Tensor class_ids, Tensor counts, Tensor keep, Tensor kept) -> Tensor");
}
