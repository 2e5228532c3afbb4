// The launch of the plugin's kernels on the CPU, with fibers for threads: with it the plugin's other sources make a
// library whose enqueue takes host memory. plugin_library.py compiles it.
#include "cuda_on_cpu.h"

#include "../../csrc/tensorrt/detect.cuh"

namespace yolov4_fast {

unsigned char shared_memory[cuda_on_cpu::SHARED_BYTES] __attribute__((aligned(16)));

// The stream is the seed: it chooses the order of threads and blocks.
const char* launch_detect(const Detect& detect, void* stream) {
  static std::string last_error;
  const auto launch = [stream](auto kernel, dim3 grid, int threads, size_t shared_bytes, const auto&... arguments) {
    if (shared_bytes > cuda_on_cpu::SHARED_BYTES) {
      throw std::runtime_error("too much shared memory");
    }
    cuda_on_cpu::Machine::instance().run(
        grid, static_cast<unsigned>(threads), shared_memory, reinterpret_cast<uintptr_t>(stream),
        [&] { kernel(arguments...); });
  };
  try {
    enqueue_detect(detect, 2, launch);
    return nullptr;
  } catch (const std::exception& error) {
    last_error = error.what();
    return last_error.c_str();
  }
}

}  // namespace yolov4_fast
