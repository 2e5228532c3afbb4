// What raw values mean: the one definition of probabilities and boxes, on the CPU and on the GPU, all in double; the
// formulas are in yolov4_fast/ops/decode.py. Compilers must not contract multiply-adds.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "everywhere.h"

namespace yolov4_fast {

// new_coords: the network has applied the logistic already.
YOLOV4_FAST_EVERYWHERE inline double probability(double raw, bool new_coords) {
  return new_coords ? raw : 1.0 / (1.0 + exp(-raw));
}

// A raw value such that none up to it gives a probability over p, whatever the roundings.
inline float raw_bound(double p, bool new_coords) {
  p *= 1 - 1e-6;
  const double raw = new_coords ? p : std::log(p / (1 - p));
  return std::nextafter(static_cast<float>(raw), -std::numeric_limits<float>::infinity());
}

// Where a box begins and ends on an axis, relative to the input.
struct Extent {
  double begin, end;
};

// t: tx or ty; s: tw or th; cell: of `cells` on the axis; anchor: its size relative to the input.
YOLOV4_FAST_EVERYWHERE inline Extent extent_of(
    double t, double s, double scale_x_y, bool new_coords, int64_t cell, int64_t cells, double anchor) {
  const double position = probability(t, new_coords) * scale_x_y - (scale_x_y - 1) / 2;
  const double center = (position + static_cast<double>(cell)) / static_cast<double>(cells);
  const double size = (new_coords ? 4 * s * s : exp(s)) * anchor;
  return {center - 0.5 * size, center + 0.5 * size};
}

}  // namespace yolov4_fast
