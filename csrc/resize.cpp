// Schema of resize; the definition is in yolov4_fast/ops/resize.py, implementations in cpu/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(yolov4_fast, m) {
  m.def("resize(Tensor[] images, int[] regions, int height, int width) -> Tensor");
}
