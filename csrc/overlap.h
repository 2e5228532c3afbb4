// Whether a box suppresses another: the one definition that decides every close pair, on the CPU and on the GPU.
#pragma once

#include <cmath>

#include "everywhere.h"

namespace yolov4_fast {

struct Criterion {
  double iou_threshold;
  bool has_penalty;  // false: plain IoU
  double beta;
};

YOLOV4_FAST_EVERYWHERE inline double lesser(double a, double b) { return b < a ? b : a; }
YOLOV4_FAST_EVERYWHERE inline double greater(double a, double b) { return a < b ? b : a; }

// Whether box b is suppressed by box a (xyxy), in double. The same bits everywhere but for the last one of pow, so the
// compilers must not contract multiply-adds.
YOLOV4_FAST_EVERYWHERE inline bool suppresses(const float* a, const float* b, const Criterion& criterion) {
  const double ax1 = a[0], ay1 = a[1], ax2 = a[2], ay2 = a[3];
  const double bx1 = b[0], by1 = b[1], bx2 = b[2], by2 = b[3];
  const double width = lesser(ax2, bx2) - greater(ax1, bx1);
  const double height = lesser(ay2, by2) - greater(ay1, by1);
  if (!(width > 0 && height > 0)) {
    return false;
  }
  const double intersection = width * height;
  const double iou =
      intersection / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection);
  if (!(iou > criterion.iou_threshold) || !criterion.has_penalty) {
    return iou > criterion.iou_threshold;
  }
  const double dx = ((ax1 + ax2) - (bx1 + bx2)) / 2, dy = ((ay1 + ay2) - (by1 + by2)) / 2;
  const double cx = greater(ax2, bx2) - lesser(ax1, bx1);
  const double cy = greater(ay2, by2) - lesser(ay1, by1);
  const double penalty = pow((dx * dx + dy * dy) / (cx * cx + cy * cy), criterion.beta);
  return iou - penalty > criterion.iou_threshold;
}

// Single-precision IoU (intersection over `all`) below which the test in double fails for certain: every rounding on
// the way together stays under 1e-6 of the union. Areas that underflow are let through by TINY.
constexpr float TINY = 1e-30f;

inline float certainly_not_bound(const Criterion& criterion) {
  return static_cast<float>(criterion.iou_threshold * (1 - 1e-5));
}

}  // namespace yolov4_fast
