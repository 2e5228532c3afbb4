// resize on the CPU: stretches each image bilinearly into its region of a canvas filled with 0.5.
//
// Each output row blends its two source rows over their whole width (contiguous, vectorised, uint8 to float on the
// way) into a scratch row that stays in the L1 cache, then samples that row. Interleaved (HWC) sources are sampled a
// pixel at a time in one four-lane vector, four pixels are transposed into the three planes.
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "simd.h"

namespace yolov4_fast {
namespace {

constexpr float FILL = 0.5f;

// The source cells that output cell `i` lies between, and how far it is towards the second.
struct Tap {
  int64_t index;
  float weight;
};

Tap tap(int64_t i, int64_t size_in, int64_t size_out) {
  if (i == size_out - 1 || size_in == 1) {
    return {size_in - 1, 0.0f};
  }
  const float scale = static_cast<float>(size_in - 1) / static_cast<float>(size_out - 1);
  const float position = static_cast<float>(i) * scale;
  const int64_t index = std::min(static_cast<int64_t>(position), size_in - 1);
  return {index, position - static_cast<float>(index)};
}

struct Source {
  const void* data;
  bool bytes;  // uint8, else float32
  int64_t height, width;
  int64_t stride_y, stride_x, stride_c;
  int64_t top, left, region_height, region_width;
  std::vector<int32_t> columns;  // [region_width] left source column
  std::vector<float> weights;    // [region_width] of the column right of it

  bool interleaved() const { return stride_c == 1 && stride_x == 3; }
};

template <typename T>
YOLOV4_FAST_INLINE void blend_body(
    const T* a, const T* b, int64_t stride, int64_t n, float weight_a, float weight_b, float* out) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = weight_a * static_cast<float>(a[i]) + weight_b * static_cast<float>(b[i]);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = weight_a * static_cast<float>(a[i * stride]) + weight_b * static_cast<float>(b[i * stride]);
    }
  }
}

YOLOV4_FAST_MULTIVERSION void blend(
    const uint8_t* a, const uint8_t* b, int64_t stride, int64_t n, float weight_a, float weight_b, float* out) {
  blend_body(a, b, stride, n, weight_a, weight_b, out);
}

YOLOV4_FAST_MULTIVERSION void blend(
    const float* a, const float* b, int64_t stride, int64_t n, float weight_a, float weight_b, float* out) {
  blend_body(a, b, stride, n, weight_a, weight_b, out);
}

YOLOV4_FAST_MULTIVERSION void sample_planar(
    const float* row, const int32_t* columns, const float* weights, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float* cell = row + columns[i];
    out[i] = (1.0f - weights[i]) * cell[0] + weights[i] * cell[1];
  }
}

using float4 = float __attribute__((vector_size(16)));

YOLOV4_FAST_INLINE float4 sample_pixel(const float* row, int32_t column, float weight) {
  float4 left, right;  // red, green, blue and whatever follows
  std::memcpy(&left, row + 3 * column, sizeof(left));
  std::memcpy(&right, row + 3 * column + 3, sizeof(right));
  return (1.0f - weight) * left + weight * right;
}

YOLOV4_FAST_MULTIVERSION void sample_interleaved(
    const float* row, const int32_t* columns, const float* weights, int64_t n, float* red, float* green,
    float* blue) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const float4 p0 = sample_pixel(row, columns[i], weights[i]);
    const float4 p1 = sample_pixel(row, columns[i + 1], weights[i + 1]);
    const float4 p2 = sample_pixel(row, columns[i + 2], weights[i + 2]);
    const float4 p3 = sample_pixel(row, columns[i + 3], weights[i + 3]);
    const float4 r = {p0[0], p1[0], p2[0], p3[0]};
    const float4 g = {p0[1], p1[1], p2[1], p3[1]};
    const float4 b = {p0[2], p1[2], p2[2], p3[2]};
    std::memcpy(red + i, &r, sizeof(r));
    std::memcpy(green + i, &g, sizeof(g));
    std::memcpy(blue + i, &b, sizeof(b));
  }
  for (; i < n; ++i) {
    const float4 p = sample_pixel(row, columns[i], weights[i]);
    red[i] = p[0];
    green[i] = p[1];
    blue[i] = p[2];
  }
}

// One row of the region from its two source rows. scratch: [3 * (width + 2)] floats.
template <typename T>
void resize_row(const Source& source, Tap y, float* scratch, float* red, float* green, float* blue) {
  const T* a = static_cast<const T*>(source.data) + y.index * source.stride_y;
  const T* b = y.weight > 0.0f ? a + source.stride_y : a;
  const float unit = source.bytes ? 1.0f / 255.0f : 1.0f;
  const float weight_a = (1.0f - y.weight) * unit;
  const float weight_b = y.weight * unit;
  const int32_t* columns = source.columns.data();
  const float* weights = source.weights.data();
  // The column after the last has weight 0, but must be finite to count for nothing.
  if (source.interleaved()) {
    blend(a, b, 1, 3 * source.width, weight_a, weight_b, scratch);
    std::fill_n(scratch + 3 * source.width, 4, 0.0f);
    sample_interleaved(scratch, columns, weights, source.region_width, red, green, blue);
    return;
  }
  float* const planes[] = {red, green, blue};
  for (int64_t c = 0; c < 3; ++c) {
    const int64_t shift = c * source.stride_c;
    blend(a + shift, b + shift, source.stride_x, source.width, weight_a, weight_b, scratch);
    scratch[source.width] = 0.0f;
    sample_planar(scratch, columns, weights, source.region_width, planes[c]);
  }
}

void output_row(const Source& source, int64_t y, int64_t height, int64_t width, float* scratch, float* out) {
  const int64_t row = y - source.top;
  float* const planes[] = {out + y * width, out + (height + y) * width, out + (2 * height + y) * width};
  if (row < 0 || row >= source.region_height) {
    for (float* plane : planes) {
      std::fill_n(plane, width, FILL);
    }
    return;
  }
  const int64_t right = source.left + source.region_width;
  for (float* plane : planes) {
    std::fill_n(plane, source.left, FILL);
    std::fill(plane + right, plane + width, FILL);
  }
  const Tap t = tap(row, source.height, source.region_height);
  float* const red = planes[0] + source.left;
  float* const green = planes[1] + source.left;
  float* const blue = planes[2] + source.left;
  if (source.bytes) {
    resize_row<uint8_t>(source, t, scratch, red, green, blue);
  } else {
    resize_row<float>(source, t, scratch, red, green, blue);
  }
}

Source make_source(const Tensor& image, const int64_t* region, int64_t height, int64_t width) {
  check_cpu(image, "every image");
  const ScalarType dtype = image.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Byte || dtype == ScalarType::Float, "an image must be uint8 or float32, not ",
      torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(
      image.dim() == 3 && image.size(2) == 3 && image.size(0) > 0 && image.size(1) > 0,
      "an image must be [height, width, 3] with at least one pixel, not ", shape_of(image));
  STD_TORCH_CHECK(
      image.size(1) <= std::numeric_limits<int32_t>::max() / 3, "an image ", image.size(1), " pixels wide is too wide");
  Source source{
      image.const_data_ptr(), dtype == ScalarType::Byte,
      image.size(0), image.size(1), image.stride(0), image.stride(1), image.stride(2),
      region[0], region[1], region[2], region[3], {}, {}};
  STD_TORCH_CHECK(
      source.top >= 0 && source.left >= 0 && source.region_height > 0 && source.region_width > 0 &&
          source.top + source.region_height <= height && source.left + source.region_width <= width,
      "region (top ", source.top, ", left ", source.left, ", height ", source.region_height, ", width ",
      source.region_width, ") does not lie within ", height, "x", width);
  for (int64_t x = 0; x < source.region_width; ++x) {
    const Tap t = tap(x, source.width, source.region_width);
    source.columns.push_back(static_cast<int32_t>(t.index));
    source.weights.push_back(t.weight);
  }
  return source;
}

Tensor resize_cpu(
    const std::vector<Tensor>& images, const std::vector<int64_t>& regions, int64_t height, int64_t width) {
  const int64_t batch = static_cast<int64_t>(images.size());
  STD_TORCH_CHECK(height > 0 && width > 0, "height and width must be at least 1, not ", height, " and ", width);
  STD_TORCH_CHECK(
      static_cast<int64_t>(regions.size()) == 4 * batch, "regions must hold 4 numbers for each of ", batch,
      " images, not ", regions.size());
  std::vector<Source> sources;
  int64_t widest = 0;
  for (int64_t i = 0; i < batch; ++i) {
    sources.push_back(make_source(images[i], regions.data() + 4 * i, height, width));
    widest = std::max(widest, sources.back().width);
  }
  Tensor output = torch::stable::empty({batch, 3, height, width}, ScalarType::Float);  // [B, 3, H, W]
  float* const out = output.mutable_data_ptr<float>();
  // An image a thread, so that one image wakes none: OpenMP's threads spin for milliseconds afterwards and take the
  // cores from the inference that follows. On two cores that cost yolov4 416 over 2 ms, to save 0.2 ms here.
  torch::stable::parallel_for(0, batch * height, height, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(3 * (widest + 2));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / height;
      output_row(sources[image], i % height, height, width, scratch.data(), out + image * 3 * height * width);
    }
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov4_fast, CPU, m) {
  m.impl("resize", TORCH_BOX(&resize_cpu));
}

}  // namespace yolov4_fast
