// diou_nms on the CPU: greedy suppression per image and class.
//
// 1. Per image: stable radix sorts by number (where given), by score, then by class, so that each class is one run in
//    order of score.
// 2. Per run: each box is tested against the boxes kept so far, which lie in separate arrays (x1, y1, ...) for the
//    vector unit. Testing against the kept, not against all that follow, ends at the first hit and touches no
//    suppressed box twice. A division-free float test with a safety margin rules out nearly every pair; what it does
//    not rule out is decided in double, so the result does not depend on the vector width.
// 3. Per image: the kept of all classes in order of score.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "../diou_nms.h"
#include "../overlap.h"
#include "simd.h"

namespace yolov4_fast {
namespace {

constexpr int64_t SERIAL_BELOW = 4096;  // candidates in the batch
constexpr int64_t LANES = 64;  // kept boxes tested at a time

// The boxes of one class kept so far, in whole groups of LANES; unused lanes overlap nothing.
class Kept {
 public:
  explicit Kept(int64_t capacity) : capacity_((capacity + LANES - 1) / LANES * LANES), data_(5 * capacity_) {
    clear(capacity_);
  }

  void clear() { clear(groups() * LANES); }

  int64_t groups() const { return (size_ + LANES - 1) / LANES; }

  void push(const float* box) {
    std::memcpy(boxes_.data() + 4 * size_, box, 4 * sizeof(float));
    for (int64_t side = 0; side < 4; ++side) {
      data_[side * capacity_ + size_] = box[side];
    }
    data_[4 * capacity_ + size_] = (box[2] - box[0]) * (box[3] - box[1]);
    ++size_;
  }

  int64_t size() const { return size_; }
  const float* box(int64_t i) const { return boxes_.data() + 4 * i; }
  const float* x1() const { return data_.data(); }
  const float* y1() const { return data_.data() + capacity_; }
  const float* x2() const { return data_.data() + 2 * capacity_; }
  const float* y2() const { return data_.data() + 3 * capacity_; }
  const float* area() const { return data_.data() + 4 * capacity_; }

 private:
  void clear(int64_t lanes) {
    constexpr float INF = std::numeric_limits<float>::infinity();
    std::fill_n(data_.data(), lanes, INF);
    std::fill_n(data_.data() + capacity_, lanes, INF);
    std::fill_n(data_.data() + 2 * capacity_, lanes, -INF);
    std::fill_n(data_.data() + 3 * capacity_, lanes, -INF);
    std::fill_n(data_.data() + 4 * capacity_, lanes, 0.0f);
    size_ = 0;
  }

  int64_t capacity_;
  std::vector<float> data_;  // [5, capacity] x1, y1, x2, y2, area
  std::vector<float> boxes_ = std::vector<float>(4 * capacity_);
  int64_t size_ = 0;
};

// The first group from `group` on with a box whose IoU with `box` may exceed the threshold, and which lanes of it;
// `groups` if there is none. `bound` is a little under the threshold.
YOLOV4_FAST_MULTIVERSION int64_t next_group(
    const float* __restrict x1, const float* __restrict y1, const float* __restrict x2, const float* __restrict y2,
    const float* __restrict area, int64_t group, int64_t groups, const float* box, float bound,
    int32_t* __restrict lanes) {
  const float bx1 = box[0], by1 = box[1], bx2 = box[2], by2 = box[3];
  const float box_area = (bx2 - bx1) * (by2 - by1);
  for (; group < groups; ++group) {
    int32_t any = 0;
    for (int64_t lane = 0; lane < LANES; ++lane) {
      const int64_t i = group * LANES + lane;
      const float width = (bx2 < x2[i] ? bx2 : x2[i]) - (bx1 > x1[i] ? bx1 : x1[i]);
      const float height = (by2 < y2[i] ? by2 : y2[i]) - (by1 > y1[i] ? by1 : y1[i]);
      const float intersection = width * height;
      const float all = box_area + area[i] - intersection;
      const int32_t hit = (width > 0.0f) & (height > 0.0f) & (intersection + TINY > bound * all);
      lanes[lane] = hit;
      any |= hit;
    }
    if (any) {
      return group;
    }
  }
  return groups;
}

bool is_suppressed(const float* box, const Kept& kept, const Criterion& criterion, float bound) {
  int32_t lanes[LANES];
  const int64_t groups = kept.groups();
  for (int64_t group = 0;; ++group) {
    group = next_group(
        kept.x1(), kept.y1(), kept.x2(), kept.y2(), kept.area(), group, groups, box, bound, lanes);
    if (group == groups) {
      return false;
    }
    for (int64_t lane = 0; lane < LANES; ++lane) {
      if (lanes[lane] && suppresses(kept.box(group * LANES + lane), box, criterion)) {
        return true;
      }
    }
  }
}

// Stable sort of `order` by keys[order[i]], ascending. Bytes that all keys share cost one pass over nothing.
void radix_sort(const std::vector<uint32_t>& keys, std::vector<int32_t>& order) {
  std::array<std::array<int32_t, 256>, 4> counts{};
  for (const int32_t i : order) {
    for (int byte = 0; byte < 4; ++byte) {
      ++counts[byte][keys[i] >> (8 * byte) & 255];
    }
  }
  std::vector<int32_t> sorted(order.size());
  for (int byte = 0; byte < 4; ++byte) {
    auto& count = counts[byte];
    if (order.empty() || count[keys[order[0]] >> (8 * byte) & 255] == static_cast<int32_t>(order.size())) {
      continue;
    }
    std::exclusive_scan(count.begin(), count.end(), count.begin(), 0);
    for (const int32_t i : order) {
      sorted[count[keys[i] >> (8 * byte) & 255]++] = i;
    }
    order.swap(sorted);
  }
}

// An unsigned key that ascends as the score descends; -0 and 0 are equal.
uint32_t descending_key(float score) {
  score += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}

struct Image {
  std::vector<int32_t> by_score;  // box numbers, best first; those with a NaN score are left out
  std::vector<int32_t> by_class;  // positions in by_score, class by class
  std::vector<uint8_t> kept;      // of each position in by_score
};

struct Run {  // one class of one image
  int64_t image, begin, end;  // positions in by_class
};

// numbers: may be null.
Image sort_image(const float* scores, const int32_t* class_ids, const int32_t* numbers, int64_t count) {
  Image image;
  image.by_score.reserve(count);
  std::vector<uint32_t> keys(count);
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isnan(scores[i])) {
      image.by_score.push_back(static_cast<int32_t>(i));
    }
  }
  if (numbers) {
    for (const int32_t i : image.by_score) {
      keys[i] = static_cast<uint32_t>(numbers[i]) ^ 0x80000000u;
    }
    radix_sort(keys, image.by_score);
  }
  for (const int32_t i : image.by_score) {
    keys[i] = descending_key(scores[i]);
  }
  radix_sort(keys, image.by_score);
  const int64_t ranked = static_cast<int64_t>(image.by_score.size());
  for (int64_t rank = 0; rank < ranked; ++rank) {
    keys[rank] = static_cast<uint32_t>(class_ids[image.by_score[rank]]);
  }
  image.by_class.resize(ranked);
  std::iota(image.by_class.begin(), image.by_class.end(), 0);
  radix_sort(keys, image.by_class);
  image.kept.assign(ranked, 0);
  return image;
}

std::vector<Run> runs_of(const std::vector<Image>& images, const int32_t* class_ids, int64_t stride) {
  std::vector<Run> runs;
  for (int64_t b = 0; b < static_cast<int64_t>(images.size()); ++b) {
    const Image& image = images[b];
    const auto class_at = [&](int64_t i) { return class_ids[b * stride + image.by_score[image.by_class[i]]]; };
    const int64_t count = static_cast<int64_t>(image.by_class.size());
    for (int64_t begin = 0, end; begin < count; begin = end) {
      for (end = begin + 1; end < count && class_at(end) == class_at(begin); ++end) {
      }
      runs.push_back({b, begin, end});
    }
  }
  return runs;
}

// Marks what one class of one image keeps, at most `limit` boxes.
void suppress_run(
    Image& image, const Run& run, const float* boxes, const Criterion& criterion, int64_t limit, Kept& kept) {
  kept.clear();
  const float bound = certainly_not_bound(criterion);
  for (int64_t i = run.begin; i < run.end && kept.size() < limit; ++i) {
    const int32_t rank = image.by_class[i];
    const float* box = boxes + 4 * image.by_score[rank];
    if (!is_suppressed(box, kept, criterion, bound)) {
      kept.push(box);
      image.kept[rank] = 1;
    }
  }
}

std::tuple<Tensor, Tensor> diou_nms_cpu(
    const Tensor& boxes_in, const Tensor& scores_in, const Tensor& class_ids_in, const Tensor& counts_in,
    double iou_threshold, std::optional<double> beta, int64_t max_detections, const std::optional<Tensor>& numbers_in) {
  const auto check_device = [](const Tensor& tensor, const char* name) { check_cpu(tensor, name); };
  check_diou_nms(
      boxes_in, scores_in, class_ids_in, counts_in, iou_threshold, beta, max_detections, numbers_in, check_device);
  const int64_t batch = boxes_in.size(0), stride = boxes_in.size(1);

  const Tensor boxes_tensor = torch::stable::contiguous(boxes_in);          // [B, K, 4]
  const Tensor scores_tensor = torch::stable::contiguous(scores_in);        // [B, K]
  const Tensor class_ids_tensor = torch::stable::contiguous(class_ids_in);  // [B, K]
  const Tensor counts_tensor = torch::stable::contiguous(counts_in);        // [B]
  std::optional<Tensor> numbers_tensor;
  if (numbers_in) {
    numbers_tensor = torch::stable::contiguous(*numbers_in);  // [B, K]
  }
  const float* const boxes = boxes_tensor.const_data_ptr<float>();
  const float* const scores = scores_tensor.const_data_ptr<float>();
  const int32_t* const class_ids = class_ids_tensor.const_data_ptr<int32_t>();
  const int32_t* const counts = counts_tensor.const_data_ptr<int32_t>();
  const int32_t* const numbers = numbers_tensor ? numbers_tensor->const_data_ptr<int32_t>() : nullptr;
  const int64_t rows = max_detections ? max_detections : stride;
  Tensor keep_tensor = torch::stable::empty({batch, rows}, ScalarType::Long);  // [B, D]
  Tensor kept_tensor = torch::stable::empty({batch}, ScalarType::Int);         // [B]
  int64_t* const keep = keep_tensor.mutable_data_ptr<int64_t>();
  int32_t* const kept = kept_tensor.mutable_data_ptr<int32_t>();

  std::vector<Image> images(batch);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t count = std::clamp<int64_t>(counts[b], 0, stride);
      images[b] = sort_image(
          scores + b * stride, class_ids + b * stride, numbers ? numbers + b * stride : nullptr, count);
    }
  });
  const std::vector<Run> runs = runs_of(images, class_ids, stride);
  const Criterion criterion{iou_threshold, beta.has_value(), beta.value_or(0)};
  // Few boxes are done before OpenMP's threads are awake, and those go on spinning, see resize.
  const int64_t count = static_cast<int64_t>(runs.size());
  const int64_t grain = batch * stride < SERIAL_BELOW ? std::max<int64_t>(1, count) : 1;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    int64_t longest = 0;
    for (int64_t i = begin; i < end; ++i) {
      longest = std::max(longest, runs[i].end - runs[i].begin);
    }
    Kept scratch(longest);
    for (int64_t i = begin; i < end; ++i) {
      suppress_run(images[runs[i].image], runs[i], boxes + runs[i].image * stride * 4, criterion, rows, scratch);
    }
  });
  for (int64_t b = 0; b < batch; ++b) {
    int64_t n = 0;
    for (size_t rank = 0; rank < images[b].by_score.size() && n < rows; ++rank) {
      if (images[b].kept[rank]) {
        keep[b * rows + n++] = images[b].by_score[rank];
      }
    }
    std::fill_n(keep + b * rows + n, rows - n, -1);
    kept[b] = static_cast<int32_t>(n);
  }
  return {keep_tensor, kept_tensor};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov4_fast, CPU, m) {
  m.impl("diou_nms", TORCH_BOX(&diou_nms_cpu));
}

}  // namespace yolov4_fast
