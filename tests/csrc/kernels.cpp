// The kernels of csrc/cuda as functions on host memory, for the tests beside it; conftest.py compiles this file.
#include "cuda_on_cpu.h"

#include "../../csrc/cuda/diou_nms.cuh"
#include "../../csrc/cuda/pack.cuh"

namespace yolov4_fast {

unsigned char shared_memory[cuda_on_cpu::SHARED_BYTES] __attribute__((aligned(16)));

namespace {

std::string last_error;

constexpr size_t MARGIN = 4096;  // bytes around the workspace, which nothing may write

const char* report(const std::function<void()>& function) {
  try {
    function();
    return nullptr;
  } catch (const std::exception& error) {
    last_error = error.what();
    return last_error.c_str();
  }
}

auto launcher(uint64_t seed) {
  return [seed](auto kernel, dim3 grid, int threads, size_t shared_bytes, const auto&... arguments) {
    if (shared_bytes > cuda_on_cpu::SHARED_BYTES) {
      throw std::runtime_error("too much shared memory");
    }
    cuda_on_cpu::Machine::instance().run(
        grid, static_cast<unsigned>(threads), shared_memory, seed, [&] { kernel(arguments...); });
  };
}

}  // namespace

extern "C" {

int max_candidates() { return MAX_CANDIDATES; }

int64_t workspace_bytes(int64_t batch, int64_t candidates) {
  DiouNms nms{};
  nms.batch = batch;
  nms.candidates = candidates;
  return static_cast<int64_t>(place_workspace(nms, nullptr));
}

// numbers may be null; beta negative: plain IoU. The workspace holds random bits before. Null, or what went wrong.
const char* diou_nms(
    const float* boxes, const float* scores, const int32_t* class_ids, const int32_t* counts, const int32_t* numbers,
    int64_t* keep, int32_t* kept, int64_t batch, int64_t candidates, int64_t detections, double iou_threshold,
    double beta, int64_t multiprocessors, uint64_t seed) {
  return report([&] {
    DiouNms nms{};
    nms.boxes = boxes;
    nms.scores = scores;
    nms.class_ids = class_ids;
    nms.counts = counts;
    nms.numbers = numbers;
    nms.keep = keep;
    nms.kept = kept;
    nms.batch = batch;
    nms.candidates = candidates;
    nms.detections = detections;
    nms.criterion = {iou_threshold, beta >= 0, beta};
    const size_t bytes = place_workspace(nms, nullptr);
    std::vector<uint64_t> words((bytes + 2 * MARGIN + 7) / 8);
    std::mt19937_64 random(seed);
    std::generate(words.begin(), words.end(), random);
    const std::vector<uint64_t> before = words;
    unsigned char* const memory = reinterpret_cast<unsigned char*>(words.data());
    place_workspace(nms, memory + MARGIN);
    enqueue_diou_nms(nms, multiprocessors, launcher(seed));
    const unsigned char* const original = reinterpret_cast<const unsigned char*>(before.data());
    if (std::memcmp(memory, original, MARGIN) ||
        std::memcmp(memory + MARGIN + bytes, original + MARGIN + bytes, MARGIN)) {
      throw std::runtime_error("a kernel wrote outside of its workspace");
    }
  });
}

const char* pack(
    const float* boxes, const float* scores, const int32_t* class_ids, const int32_t* counts, const int64_t* keep,
    const int32_t* kept, float* packed, int64_t batch, int64_t candidates, int64_t detections, uint64_t seed) {
  return report([&] {
    enqueue_pack(
        Pack{boxes, scores, class_ids, counts, keep, kept, packed, batch, candidates, detections}, launcher(seed));
  });
}
}

}  // namespace yolov4_fast
