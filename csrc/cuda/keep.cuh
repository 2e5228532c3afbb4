// diou_nms, third kernel: who is kept; a block an image, tile by tile.
//
// In a tile, whoever has no suppressor that is kept or still open is kept, until none is open (one round for each link
// in the longest chain of suppressors); then every later candidate looks up whether one of those is its suppressor. The
// kept are put in order of rank by a prefix sum.
#pragma once

#include <cstdint>

#include "block.cuh"
#include "diou_nms.h"

namespace yolov4_fast {

constexpr int32_t PER_THREAD = MAX_CANDIDATES / BLOCK;

struct KeepShared {
  uint32_t alive[MAX_CANDIDATES / WARP];  // bits by place
  uint32_t by_rank[MAX_CANDIDATES / WARP];  // bits by rank: kept
  uint32_t before[MAX_CANDIDATES / WARP];   // kept in the words of by_rank before
  uint64_t kept[MAX_CANDIDATES / TILE];     // bits by place
  int32_t last_class[MAX_CANDIDATES / TILE];
  uint32_t sums[WARP];
};

// Which of the open candidates of a tile are kept. own: words of places `lane` and `lane + 32` about their own tile.
// One warp, all lanes of which take part and get the result.
__device__ inline uint64_t resolve_tile(uint64_t open, uint64_t own_low, uint64_t own_high) {
  const int32_t lane = threadIdx.x % WARP;
  uint64_t kept = 0;
  while (open) {  // the first open one is always decided
    const bool low = open >> lane & 1, high = open >> (lane + WARP) & 1;
    const uint64_t keeps =
        __ballot_sync(ALL_LANES, low && !(own_low & (open | kept))) |
        uint64_t{__ballot_sync(ALL_LANES, high && !(own_high & (open | kept)))} << WARP;
    const uint64_t drops =
        __ballot_sync(ALL_LANES, low && (own_low & kept)) |
        uint64_t{__ballot_sync(ALL_LANES, high && (own_high & kept))} << WARP;
    kept |= keeps;
    open &= ~(keeps | drops);
  }
  return kept;
}

__global__ void __launch_bounds__(BLOCK) keep_survivors(const DiouNms nms) {
  KeepShared& shared = *reinterpret_cast<KeepShared*>(shared_memory);
  const int64_t image = blockIdx.x;
  const int64_t row = image * nms.capacity();
  const int32_t ranked = nms.ranked[image];
  const int32_t tiles = (ranked + TILE - 1) / TILE;
  const int32_t thread = static_cast<int32_t>(threadIdx.x), lane = thread % WARP;
  const uint64_t* const suppressors = nms.suppressors + image * nms.words();
  const auto word_about = [&](int32_t tile, int32_t place) {
    return place < ranked ? suppressors[nms.suppressor(tile, place)] : 0;
  };

  // A thread has the places thread, thread + BLOCK, ...
  bool alive[PER_THREAD];
  int32_t classes[PER_THREAD];
  uint64_t words[PER_THREAD];  // about the tile that is resolved next
  for (int32_t i = 0; i < PER_THREAD; ++i) {
    const int32_t place = thread + i * BLOCK;
    alive[i] = place < ranked;
    classes[i] = alive[i] ? nms.classes[row + place] : 0;
    const uint32_t bits = __ballot_sync(ALL_LANES, alive[i]);
    if (lane == 0) {
      shared.alive[place / WARP] = bits;
    }
  }
  if (thread < tiles) {
    const int32_t last = thread * TILE + TILE - 1;
    shared.last_class[thread] = nms.classes[row + (last < ranked ? last : ranked - 1)];
  }
  if (thread < MAX_CANDIDATES / WARP) {
    shared.by_rank[thread] = 0;
  }
  __syncthreads();
  uint64_t own_low = 0, own_high = 0;
  const auto fetch = [&](int32_t tile) {
    for (int32_t i = 0; i < PER_THREAD; ++i) {
      const int32_t place = thread + i * BLOCK;
      const bool meets = alive[i] && place >= (tile + 1) * TILE && classes[i] == shared.last_class[tile];
      words[i] = meets ? word_about(tile, place) : 0;
    }
    if (thread < WARP) {
      own_low = word_about(tile, tile * TILE + lane);
      own_high = word_about(tile, tile * TILE + WARP + lane);
    }
  };
  if (tiles > 0) {
    fetch(0);
  }
  for (int32_t tile = 0; tile < tiles; ++tile) {
    if (thread < WARP) {
      const uint64_t open = shared.alive[2 * tile] | uint64_t{shared.alive[2 * tile + 1]} << WARP;
      const uint64_t kept = resolve_tile(open, own_low, own_high);
      if (lane == 0) {
        shared.kept[tile] = kept;
      }
    }
    __syncthreads();
    const uint64_t kept = shared.kept[tile];
    for (int32_t i = 0; i < PER_THREAD; ++i) {
      alive[i] = alive[i] && !(words[i] & kept);
      const int32_t place = thread + i * BLOCK;
      if (place / TILE == tile + 1) {  // a whole warp
        const uint32_t bits = __ballot_sync(ALL_LANES, alive[i]);
        if (lane == 0) {
          shared.alive[place / WARP] = bits;
        }
      }
    }
    if (tile + 1 < tiles) {
      fetch(tile + 1);  // arrives while the first warp resolves the tile
    }
    __syncthreads();
  }

  for (int32_t i = 0; i < PER_THREAD; ++i) {
    const int32_t place = thread + i * BLOCK;
    if (place < ranked && (shared.kept[place / TILE] >> place % TILE & 1)) {
      const int32_t rank = nms.ranks[row + place];
      atomicOr(&shared.by_rank[rank / WARP], 1u << rank % WARP);
    }
  }
  __syncthreads();
  const bool has_word = thread < MAX_CANDIDATES / WARP;
  const uint32_t before = exclusive_scan_of_block(has_word ? __popc(shared.by_rank[thread]) : 0, shared.sums);
  if (has_word) {
    shared.before[thread] = before;
  }
  __syncthreads();
  int64_t* const keep = nms.keep + image * nms.detections;
  for (int32_t i = 0; i < PER_THREAD; ++i) {
    const int32_t rank = thread + i * BLOCK;
    const uint32_t bits = shared.by_rank[rank / WARP];
    if (bits >> rank % WARP & 1) {
      const int64_t at = shared.before[rank / WARP] + __popc(bits & ((1u << rank % WARP) - 1));
      if (at < nms.detections) {
        keep[at] = nms.positions[row + rank];
      }
    }
  }
  const int64_t survivors = shared.sums[WARP - 1];
  for (int64_t at = survivors + thread; at < nms.detections; at += BLOCK) {
    keep[at] = -1;
  }
  if (thread == 0) {
    nms.kept[image] = static_cast<int32_t>(survivors < nms.detections ? survivors : nms.detections);
  }
}

}  // namespace yolov4_fast
