// What diou_nms's kernels read and write, where their workspace lies, and how they are launched: all that the host
// needs to know of them. Free of torch and of CUDA's headers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../overlap.h"

namespace yolov4_fast {

constexpr int32_t MAX_CANDIDATES = 4096;  // of an image; yolov4_fast/ops/diou_nms.py has the same number
constexpr int32_t TILE = 64;  // candidates whose fate towards one another fits a word each

struct DiouNms {
  // Arguments and results, contiguous.
  const float* boxes;        // [B, K, 4]
  const float* scores;       // [B, K]
  const int32_t* class_ids;  // [B, K]
  const int32_t* counts;     // [B]
  const int32_t* numbers;    // [B, K] or null
  int64_t* keep;             // [B, D]
  int32_t* kept;             // [B]
  int64_t batch, candidates, detections;  // B, K, D
  Criterion criterion;

  // Workspace. N = min(K, MAX_CANDIDATES) in whole tiles; "rank": place by score; "place": by class, then by rank.
  uint64_t* suppressors;  // [B, words(N)] see `suppressor`: which earlier candidates of a tile suppress this one
  float* sorted_boxes;    // [B, N, 4] by place
  int32_t* classes;       // [B, N] by place
  int32_t* ranks;         // [B, N] by place
  int32_t* positions;     // [B, N] by rank: number of the candidate in the input
  int32_t* selected;      // [B, N] positions of the best, in no order, where there are more than N
  int32_t* ranked;        // [B] how many take part

  YOLOV4_FAST_EVERYWHERE int64_t tiles() const {
    return ((candidates < MAX_CANDIDATES ? candidates : MAX_CANDIDATES) + TILE - 1) / TILE;
  }
  YOLOV4_FAST_EVERYWHERE int64_t capacity() const { return tiles() * TILE; }
  YOLOV4_FAST_EVERYWHERE int64_t words() const { return tiles() * (tiles() + 1) / 2 * TILE; }

  // Word of the candidate at `place` about those of tile `earlier`, which is its own or one before: a triangle, tile by
  // tile, in which the words of neighbours lie side by side.
  YOLOV4_FAST_EVERYWHERE int64_t suppressor(int64_t earlier, int64_t place) const {
    return TILE * (tiles() * earlier - earlier * (earlier - 1) / 2) + place - TILE * earlier;
  }
};

// Gives each array of the workspace its place from `base` on (null to measure) and returns the bytes of all of them.
inline size_t place_workspace(DiouNms& nms, unsigned char* base) {
  size_t end = 0;
  const auto place = [&](auto*& array, int64_t count) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(base + end);
    end += static_cast<size_t>(count) * sizeof(*array);
  };
  place(nms.suppressors, nms.batch * nms.words());  // whole tiles: what follows stays aligned to 16 bytes
  place(nms.sorted_boxes, nms.batch * nms.capacity() * 4);
  place(nms.classes, nms.batch * nms.capacity());
  place(nms.ranks, nms.batch * nms.capacity());
  place(nms.positions, nms.batch * nms.capacity());
  place(nms.selected, nms.batch * nms.capacity());
  place(nms.ranked, nms.batch);
  return end;
}

// A tile's work on earlier tiles is spread over this many blocks: the last of 64 tiles of one class meets all others.
constexpr int32_t PHASES = 8;

// Blocks an image for the kernel that compares pairs: enough to fill the GPU in few candidates' or many, and no more,
// as even a block that finds nothing to do takes its time.
inline int64_t pair_blocks(const DiouNms& nms, int64_t multiprocessors) {
  constexpr int64_t RESIDENT = 16;  // blocks of one tile that a multiprocessor runs at once, on every generation
  const int64_t blocks = (RESIDENT * multiprocessors + nms.batch - 1) / nms.batch;
  return std::clamp<int64_t>(blocks, 1, nms.tiles() * PHASES);
}

// Enqueue on a cudaStream_t of the device; null, or what went wrong.
const char* launch_diou_nms(const DiouNms& nms, int device, void* stream);

}  // namespace yolov4_fast
