// What decode and NMS of raw maps read and write on the GPU, where their workspace lies, and how they are launched: all
// that the host needs to know of them. Free of TensorRT, of torch and of CUDA's headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../cuda/diou_nms.h"

namespace yolov4_fast {

constexpr int32_t MOST_HEADS = 6;
constexpr int32_t MOST_ANCHORS = 12;  // of a head
constexpr int64_t MOST_IMAGES = 65535;  // what CUDA allows a grid's second dimension

enum class MapType { float32, float16, bfloat16 };

struct DetectHead {
  const void* raw;  // [B, A * (5 + C), h, w], contiguous
  int32_t anchors, height, width;
  int32_t new_coords;
  float bound;       // raw objectness up to here cannot pass
  double scale_x_y;
  double sizes[2 * MOST_ANCHORS];  // width and height of each anchor, relative to the input

  YOLOV4_FAST_EVERYWHERE int32_t cells() const { return height * width; }
  YOLOV4_FAST_EVERYWHERE int32_t pairs() const { return anchors * cells(); }  // an anchor of a cell
};

// B images, K candidates at most in each: every class of every pair, so that there is always room.
struct Detect {
  DetectHead heads[MOST_HEADS];
  int32_t head_count, classes;
  MapType type;
  float confidence;

  // Results, D an image; what is over `kept` is 0, and -1 in class_ids.
  int32_t* kept;       // [B]
  float* boxes;        // [B, D, 4] xyxy relative to the input
  float* scores;       // [B, D]
  int32_t* class_ids;  // [B, D]

  // Workspace.
  float* candidate_boxes;  // [B, K, 4]
  float* candidate_scores;
  int32_t* candidate_classes;
  int32_t* candidate_numbers;  // (head, anchor, cell, class) as one number: order of the candidates of one score
  uint32_t* counts;            // [B]
  DiouNms nms;

  YOLOV4_FAST_EVERYWHERE int32_t pairs() const {
    int32_t sum = 0;
    for (int32_t i = 0; i < head_count; ++i) {
      sum += heads[i].pairs();
    }
    return sum;
  }
};

// Gives each array of the workspace its place from `base` on (null to measure), aligned to 16 bytes, fills in `nms` but
// for what is measured by it, and returns the bytes of all. The heads, the results and nms.batch, detections and
// criterion are there before.
inline size_t place_workspace(Detect& detect, unsigned char* base) {
  DiouNms& nms = detect.nms;
  nms.candidates = int64_t{detect.pairs()} * detect.classes;
  size_t end = 0;
  const auto place = [&](auto*& array, int64_t count) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(base + end);
    end += (static_cast<size_t>(count) * sizeof(*array) + 15) / 16 * 16;
  };
  place(detect.candidate_boxes, 4 * nms.batch * nms.candidates);
  place(detect.candidate_scores, nms.batch * nms.candidates);
  place(detect.candidate_classes, nms.batch * nms.candidates);
  place(detect.candidate_numbers, nms.batch * nms.candidates);
  place(detect.counts, nms.batch);
  place(nms.keep, nms.batch * nms.detections);
  nms.boxes = detect.candidate_boxes;
  nms.scores = detect.candidate_scores;
  nms.class_ids = detect.candidate_classes;
  nms.numbers = detect.candidate_numbers;
  nms.counts = reinterpret_cast<const int32_t*>(detect.counts);
  nms.kept = detect.kept;
  return end + place_workspace(nms, base + end);
}

// Enqueue on a cudaStream_t of the current device; null, or what went wrong.
const char* launch_detect(const Detect& detect, void* stream);

}  // namespace yolov4_fast
