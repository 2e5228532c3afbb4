// Schema of decode; the definition is in yolov4_fast/ops/decode.py, implementations in cpu/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(yolov4_fast, m) {
  m.def(
      "decode(Tensor[] maps, float[] anchors, int[] anchor_counts, float[] scale_x_y, bool[] new_coords, "
      "int height, int width, float confidence, Tensor? placement=None, int capacity=0) "
      "-> (Tensor boxes, Tensor scores, Tensor class_ids, Tensor counts)");
}
