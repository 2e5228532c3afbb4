// decode on the CPU: raw maps in place, whatever their strides, to candidates over the confidence.
//
// Work is cut into slices (some rows of one anchor of one map of one image), decoded independently and joined in order,
// so the result does not depend on the number of threads. In a slice the objectness of all cells is compared as a raw
// logit; only cells that pass have their class logits read, again compared raw. Both comparisons err a little on the
// side of passing; what passes is decided by the exact score, in double.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "../decode.h"
#include "simd.h"

namespace yolov4_fast {
namespace {

constexpr int64_t CELLS_PER_SLICE = 2048;

struct Map {
  const float* data;
  int64_t stride_image, stride_channel, stride_y, stride_x;
  int64_t anchors, classes, height, width;
  std::vector<double> anchor_sizes;  // [anchors * 2] width and height, relative to the input
  double scale_x_y;
  bool new_coords;
};

struct Slice {
  int64_t image;
  const Map* map;
  int64_t anchor, begin, end;  // rows
};

struct Found {
  float box[4];
  float score;
  int32_t class_id;
};

struct Hit {
  int32_t cell;  // position among the cells that passed
  int32_t class_id;
};

struct Cell {
  int64_t x, y;
  double objectness;
  float bound;  // raw class values up to here cannot pass
};

// Numbers of the values over the bound, which NaN is not; `out` has room for n.
YOLOV4_FAST_MULTIVERSION int64_t
select(const float* values, int64_t stride, int64_t n, float bound, int32_t* out) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    out[count] = static_cast<int32_t>(i);
    count += values[i * stride] > bound;
  }
  return count;
}

// Hits of one class among the cells; `out` has room for all of them.
int64_t select_cells(
    const float* plane, const std::vector<int64_t>& offsets, const std::vector<float>& bounds, int32_t class_id,
    Hit* out) {
  int64_t count = 0;
  for (size_t i = 0; i < offsets.size(); ++i) {
    out[count] = {static_cast<int32_t>(i), class_id};
    count += plane[offsets[i]] > bounds[i];
  }
  return count;
}

class Decoder {
 public:
  Decoder(float confidence, const float* placement) : confidence_(confidence), placement_(placement) {}

  std::vector<Found> decode(const Slice& slice) const {
    const Map& map = *slice.map;
    const float* base = map.data + slice.image * map.stride_image +
        slice.anchor * (5 + map.classes) * map.stride_channel;
    const std::vector<Cell> cells = cells_over(slice, base + 4 * map.stride_channel);
    std::vector<Found> found;
    if (cells.empty()) {
      return found;
    }
    int32_t boxed = -1;
    bool finite = false;
    Found next{};
    for (const Hit& hit : hits(map, base + 5 * map.stride_channel, cells)) {
      const Cell& cell = cells[hit.cell];
      const float* values = base + cell.y * map.stride_y + cell.x * map.stride_x;
      const double p = probability(values[(5 + hit.class_id) * map.stride_channel], map.new_coords);
      next.score = static_cast<float>(cell.objectness * p);
      if (!(next.score > confidence_)) {
        continue;
      }
      if (hit.cell != boxed) {
        finite = box(slice, cell, values, next.box);
        boxed = hit.cell;
      }
      if (finite) {
        next.class_id = hit.class_id;
        found.push_back(next);
      }
    }
    return found;
  }

 private:
  std::vector<Cell> cells_over(const Slice& slice, const float* plane) const {
    const Map& map = *slice.map;
    const float bound = raw_bound(confidence_, map.new_coords);
    std::vector<int32_t> columns(map.width);
    std::vector<Cell> cells;
    for (int64_t y = slice.begin; y < slice.end; ++y) {
      const float* row = plane + y * map.stride_y;
      const int64_t count = select(row, map.stride_x, map.width, bound, columns.data());
      for (int64_t i = 0; i < count; ++i) {
        const double objectness = probability(row[columns[i] * map.stride_x], map.new_coords);
        if (static_cast<float>(objectness) > confidence_) {
          cells.push_back({columns[i], y, objectness, raw_bound(confidence_ / objectness, map.new_coords)});
        }
      }
    }
    return cells;
  }

  // Pairs of cell and class that may pass, in order of cell, then class.
  static std::vector<Hit> hits(const Map& map, const float* base, const std::vector<Cell>& cells) {
    std::vector<Hit> hits;
    if (map.stride_channel == 1) {  // channels last: a cell's classes lie together
      std::vector<int32_t> classes(map.classes);
      for (size_t i = 0; i < cells.size(); ++i) {
        const float* values = base + cells[i].y * map.stride_y + cells[i].x * map.stride_x;
        const int64_t count = select(values, 1, map.classes, cells[i].bound, classes.data());
        for (int64_t k = 0; k < count; ++k) {
          hits.push_back({static_cast<int32_t>(i), classes[k]});
        }
      }
      return hits;
    }
    // Planes: class by class, so that memory is read in order; a counting sort then groups the hits by cell.
    std::vector<int64_t> offsets;
    std::vector<float> bounds;
    for (const Cell& cell : cells) {
      offsets.push_back(cell.y * map.stride_y + cell.x * map.stride_x);
      bounds.push_back(cell.bound);
    }
    size_t count = 0;
    for (int64_t c = 0; c < map.classes; ++c) {
      if (hits.size() < count + cells.size()) {
        hits.resize(2 * (count + cells.size()));
      }
      count += select_cells(
          base + c * map.stride_channel, offsets, bounds, static_cast<int32_t>(c), hits.data() + count);
    }
    hits.resize(count);
    std::vector<int32_t> starts(cells.size() + 1);
    for (const Hit& hit : hits) {
      ++starts[hit.cell + 1];
    }
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    std::vector<Hit> sorted(count);
    for (const Hit& hit : hits) {
      sorted[starts[hit.cell]++] = hit;
    }
    return sorted;
  }

  // Corners in the original image; false if one of them is not finite.
  bool box(const Slice& slice, const Cell& cell, const float* values, float* out) const {
    const Map& map = *slice.map;
    const int64_t cells[2] = {cell.x, cell.y}, counts[2] = {map.width, map.height};
    Extent extents[2];
    for (int axis = 0; axis < 2; ++axis) {
      extents[axis] = extent_of(
          values[axis * map.stride_channel], values[(2 + axis) * map.stride_channel], map.scale_x_y, map.new_coords,
          cells[axis], counts[axis], map.anchor_sizes[2 * slice.anchor + axis]);
    }
    bool finite = true;
    for (int side = 0; side < 4; ++side) {
      const int axis = side % 2;
      double value = side < 2 ? extents[axis].begin : extents[axis].end;
      if (placement_) {
        value = value * placement_[4 * slice.image + axis] + placement_[4 * slice.image + 2 + axis];
      }
      out[side] = static_cast<float>(value);
      finite = finite && std::isfinite(out[side]);
    }
    return finite;
  }

  float confidence_;
  const float* placement_;  // [B, 4] or null
};

std::vector<Map> make_maps(
    const std::vector<Tensor>& tensors, const std::vector<double>& anchors, const std::vector<int64_t>& anchor_counts,
    const std::vector<double>& scale_x_y, const std::vector<bool>& new_coords, int64_t height, int64_t width) {
  const size_t count = tensors.size();
  STD_TORCH_CHECK(
      count > 0 && anchor_counts.size() == count && scale_x_y.size() == count && new_coords.size() == count,
      "anchor_counts, scale_x_y and new_coords must have one entry for each of ", count, " maps, not ",
      anchor_counts.size(), ", ", scale_x_y.size(), " and ", new_coords.size());
  std::vector<Map> maps;
  size_t next_anchor = 0;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& tensor = tensors[i];  // [B, A * (5 + C), h, w]
    check_cpu(tensor, "every map");
    check_dtype(tensor, ScalarType::Float, "every map");
    STD_TORCH_CHECK(
        tensor.dim() == 4 && tensor.size(0) == tensors[0].size(0),
        "every map must be [batch, anchors * (5 + classes), height, width] with the first one's batch, not ",
        shape_of(tensor));
    const int64_t entries = anchor_counts[i] > 0 ? tensor.size(1) / anchor_counts[i] : 0;
    STD_TORCH_CHECK(
        entries > 5 && entries * anchor_counts[i] == tensor.size(1), tensor.size(1), " channels of map ", i,
        " do not divide into ", anchor_counts[i], " anchors of 5 + classes");
    STD_TORCH_CHECK(
        tensor.size(2) * tensor.size(3) <= std::numeric_limits<int32_t>::max(), "map ", i, " is too large: ",
        shape_of(tensor));
    STD_TORCH_CHECK(
        next_anchor + 2 * anchor_counts[i] <= anchors.size(), "anchors must hold 2 numbers for each anchor, not ",
        anchors.size(), " in all");
    Map map{
        tensor.const_data_ptr<float>(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3),
        anchor_counts[i], entries - 5, tensor.size(2), tensor.size(3), {}, scale_x_y[i], new_coords[i]};
    for (int64_t k = 0; k < 2 * anchor_counts[i]; ++k) {
      map.anchor_sizes.push_back(anchors[next_anchor++] / static_cast<double>(k % 2 ? height : width));
    }
    maps.push_back(map);
  }
  STD_TORCH_CHECK(
      next_anchor == anchors.size(), "anchors must hold ", next_anchor, " numbers, not ", anchors.size());
  return maps;
}

std::vector<Slice> make_slices(const std::vector<Map>& maps, int64_t batch) {
  std::vector<Slice> slices;
  for (int64_t image = 0; image < batch; ++image) {
    for (const Map& map : maps) {
      const int64_t rows = std::max<int64_t>(1, CELLS_PER_SLICE / std::max<int64_t>(1, map.width));
      for (int64_t anchor = 0; anchor < map.anchors; ++anchor) {
        for (int64_t y = 0; y < map.height; y += rows) {
          slices.push_back({image, &map, anchor, y, std::min(y + rows, map.height)});
        }
      }
    }
  }
  return slices;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> join(
    const std::vector<Slice>& slices, const std::vector<std::vector<Found>>& found, int64_t batch, int64_t capacity) {
  Tensor counts_tensor = torch::stable::empty({batch}, ScalarType::Int);  // [B]
  int32_t* const counts = counts_tensor.mutable_data_ptr<int32_t>();
  std::fill_n(counts, batch, 0);
  for (size_t i = 0; i < slices.size(); ++i) {
    counts[slices[i].image] += static_cast<int32_t>(found[i].size());
  }
  const int64_t rows = capacity ? capacity : (batch ? *std::max_element(counts, counts + batch) : 0);
  Tensor boxes_tensor = torch::stable::empty({batch, rows, 4}, ScalarType::Float);  // [B, K, 4]
  Tensor scores_tensor = torch::stable::empty({batch, rows}, ScalarType::Float);    // [B, K]
  Tensor class_ids_tensor = torch::stable::empty({batch, rows}, ScalarType::Int);   // [B, K]
  float* const boxes = boxes_tensor.mutable_data_ptr<float>();
  float* const scores = scores_tensor.mutable_data_ptr<float>();
  int32_t* const class_ids = class_ids_tensor.mutable_data_ptr<int32_t>();
  size_t slice = 0;
  for (int64_t image = 0; image < batch; ++image) {
    int64_t row = image * rows;
    const int64_t end = row + rows;
    for (; slice < slices.size() && slices[slice].image == image; ++slice) {
      for (const Found& candidate : found[slice]) {
        if (row == end) {
          break;
        }
        std::copy_n(candidate.box, 4, boxes + 4 * row);
        scores[row] = candidate.score;
        class_ids[row] = candidate.class_id;
        ++row;
      }
    }
    std::fill(boxes + 4 * row, boxes + 4 * end, 0.0f);
    std::fill(scores + row, scores + end, 0.0f);
    std::fill(class_ids + row, class_ids + end, -1);
  }
  return {boxes_tensor, scores_tensor, class_ids_tensor, counts_tensor};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> decode_cpu(
    const std::vector<Tensor>& tensors, const std::vector<double>& anchors, const std::vector<int64_t>& anchor_counts,
    const std::vector<double>& scale_x_y, const std::vector<bool>& new_coords, int64_t height, int64_t width,
    double confidence, const std::optional<Tensor>& placement, int64_t capacity) {
  STD_TORCH_CHECK(height > 0 && width > 0, "height and width must be at least 1, not ", height, " and ", width);
  STD_TORCH_CHECK(confidence >= 0 && confidence <= 1, "confidence must be in 0..1, not ", confidence);
  STD_TORCH_CHECK(capacity >= 0, "capacity must be at least 0, not ", capacity);
  const std::vector<Map> maps = make_maps(tensors, anchors, anchor_counts, scale_x_y, new_coords, height, width);
  const int64_t batch = tensors[0].size(0);
  std::optional<Tensor> placement_tensor;
  if (placement) {
    check_cpu(*placement, "placement");
    check_dtype(*placement, ScalarType::Float, "placement");
    check_shape(*placement, {batch, 4}, "placement");
    placement_tensor = torch::stable::contiguous(*placement);  // [B, 4]
  }
  const Decoder decoder(
      static_cast<float>(confidence), placement_tensor ? placement_tensor->const_data_ptr<float>() : nullptr);
  const std::vector<Slice> slices = make_slices(maps, batch);
  std::vector<std::vector<Found>> found(slices.size());
  // An image a thread: waking OpenMP's threads for one image costs more than it saves, see resize.
  const int64_t count = static_cast<int64_t>(slices.size());
  const int64_t per_image = std::max<int64_t>(1, count / std::max<int64_t>(1, batch));
  torch::stable::parallel_for(0, count, per_image, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      found[i] = decoder.decode(slices[i]);
    }
  });
  return join(slices, found, batch, capacity);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov4_fast, CPU, m) {
  m.impl("decode", TORCH_BOX(&decode_cpu));
}

}  // namespace yolov4_fast
