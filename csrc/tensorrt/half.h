// 16-bit floating point as bits in memory, read as float, exactly; the same on the host and on the GPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "../everywhere.h"

namespace yolov4_fast {

struct Half {
  uint16_t bits;  // IEEE 754 binary16
};

struct Bfloat {
  uint16_t bits;  // the upper half of a float
};

YOLOV4_FAST_EVERYWHERE inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

YOLOV4_FAST_EVERYWHERE inline float value_of(float value) { return value; }

YOLOV4_FAST_EVERYWHERE inline float value_of(Bfloat value) { return float_of(uint32_t{value.bits} << 16); }

// Half's exponent is biased by 15 and float's by 127, and its fraction has 13 bits less.
YOLOV4_FAST_EVERYWHERE inline float value_of(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) {  // infinity and NaN
    return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  }
  if (rest < 0x0400u) {  // zero and subnormal: a multiple of 2^-24
    const float magnitude = static_cast<float>(rest) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return float_of(sign | ((rest << 13) + (112u << 23)));
}

YOLOV4_FAST_EVERYWHERE inline bool is_finite(float value) {
  return value - value == 0.0f;  // infinity and NaN give NaN
}

}  // namespace yolov4_fast
