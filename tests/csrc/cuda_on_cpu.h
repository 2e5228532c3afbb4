// Runs CUDA kernels on the CPU: as much of the language as the kernels of csrc/cuda use, with a fiber for each thread.
//
// The fibers of a block run one at a time, each until it ends or waits for its warp or block, in an order that a seed
// chooses anew in every round; blocks run in an order chosen likewise. A result that depends on the order of threads or
// blocks, as with a barrier forgotten, shows as a difference between seeds. Shared memory is random before each block.
// A barrier that not every thread reaches is an error, stricter than CUDA.
#pragma once

#include <csetjmp>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__ static
#define __device__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(threads)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct float4 {
  float x, y, z, w;
};

inline dim3 threadIdx, blockIdx, gridDim;

namespace cuda_on_cpu {

constexpr unsigned LANES = 32, MOST_THREADS = 1024;
constexpr size_t STACK_BYTES = 64 * 1024, SHARED_BYTES = 48 * 1024;

enum class State { ready, at_warp, at_block, done };

struct Fiber {
  State state;
  bool is_new = true;
  unsigned exchanges = 0;  // with its warp, so far
  jmp_buf context;
  ucontext_t beginning;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
};

// What the lanes of a warp show to each other, in turns in two places: a lane may be one exchange ahead of another.
struct Warp {
  uint64_t shown[2][LANES];
  const char* operation[2][LANES];
};

class Machine {
 public:
  static Machine& instance() {
    static Machine machine;
    return machine;
  }

  void run(dim3 grid, unsigned threads, unsigned char* shared, uint64_t seed, std::function<void()> kernel) {
    if (threads % LANES || threads > MOST_THREADS) {
      throw std::runtime_error("a block must have whole warps, at most 1024 threads");
    }
    random_.seed(seed);
    kernel_ = std::move(kernel);
    gridDim = grid;
    error_.clear();
    std::vector<unsigned> blocks(grid.x * grid.y);
    shuffle(blocks, seed);
    for (const unsigned block : blocks) {
      blockIdx = dim3(block % grid.x, block / grid.x);
      std::generate_n(shared, SHARED_BYTES, [&] { return static_cast<unsigned char>(random_()); });
      run_block(threads, seed);
    }
  }

  void wait(State state) {
    fibers_[current_].state = state;
    leave();
  }

  // Shows `value` to the warp; what each of its lanes showed.
  const uint64_t* exchange(const char* operation, uint64_t value) {
    Fiber& fiber = fibers_[current_];
    Warp& warp = warps_[current_ / LANES];
    const unsigned turn = fiber.exchanges++ % 2;
    warp.shown[turn][current_ % LANES] = value;
    warp.operation[turn][current_ % LANES] = operation;
    wait(State::at_warp);
    for (const char* other : warp.operation[turn]) {
      if (other != operation) {
        error_ = std::string("lanes of one warp meet in ") + operation + " and " + other;
      }
    }
    return warp.shown[turn];
  }

 private:
  void run_block(unsigned threads, uint64_t seed) {
    for (unsigned i = 0; i < threads; ++i) {
      fibers_[i].state = State::ready;
      fibers_[i].exchanges = 0;
    }
    std::vector<unsigned> order(threads);
    for (bool goes_on = true; goes_on;) {
      goes_on = false;
      shuffle(order, seed);
      for (const unsigned i : order) {
        if (fibers_[i].state == State::ready) {
          enter(i);
          goes_on = true;
        }
      }
      for (unsigned first = 0; first < threads; first += LANES) {
        goes_on |= release(first, first + LANES, State::at_warp);
      }
      goes_on |= release(0, threads, State::at_block);
    }
    for (unsigned i = 0; i < threads; ++i) {
      if (fibers_[i].state != State::done && error_.empty()) {
        error_ = "thread " + std::to_string(i) + " waits where others never come";
      }
      fibers_[i].is_new |= fibers_[i].state != State::done;
    }
    if (!error_.empty()) {
      throw std::runtime_error(error_);
    }
  }

  bool release(unsigned begin, unsigned end, State state) {
    for (unsigned i = begin; i < end; ++i) {
      if (fibers_[i].state != state) {
        return false;
      }
    }
    for (unsigned i = begin; i < end; ++i) {
      fibers_[i].state = State::ready;
    }
    return true;
  }

  void shuffle(std::vector<unsigned>& order, uint64_t seed) {
    std::iota(order.begin(), order.end(), 0);
    if (seed == 1) {
      std::reverse(order.begin(), order.end());
    } else if (seed > 1) {
      std::shuffle(order.begin(), order.end(), random_);
    }
  }

  void enter(unsigned i) {
    current_ = i;
    threadIdx = dim3(i, 0, 0);
    if (_setjmp(scheduler_)) {
      return;
    }
    Fiber& fiber = fibers_[i];
    if (!fiber.is_new) {
      _longjmp(fiber.context, 1);
    }
    fiber.is_new = false;
    getcontext(&fiber.beginning);
    fiber.beginning.uc_stack.ss_sp = fiber.stack.get();
    fiber.beginning.uc_stack.ss_size = STACK_BYTES;
    fiber.beginning.uc_link = nullptr;
    makecontext(&fiber.beginning, &Machine::run_fiber, 0);
    setcontext(&fiber.beginning);
  }

  __attribute__((noinline)) void leave() {
    if (!_setjmp(fibers_[current_].context)) {
      _longjmp(scheduler_, 1);
    }
  }

  // A fiber outlives its block and runs the same thread of the next.
  static void run_fiber() {
    Machine& machine = instance();
    for (;;) {
      machine.kernel_();
      machine.wait(State::done);
    }
  }

  std::vector<Fiber> fibers_ = std::vector<Fiber>(MOST_THREADS);
  std::vector<Warp> warps_ = std::vector<Warp>(MOST_THREADS / LANES);
  std::function<void()> kernel_;
  std::mt19937_64 random_;
  std::string error_;
  jmp_buf scheduler_;
  unsigned current_ = 0;
};

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::Machine::instance().wait(cuda_on_cpu::State::at_block); }

inline void __syncwarp() { cuda_on_cpu::Machine::instance().exchange("syncwarp", 0); }

inline unsigned __ballot_sync(unsigned, bool predicate) {
  const uint64_t* shown = cuda_on_cpu::Machine::instance().exchange("ballot", predicate);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < cuda_on_cpu::LANES; ++lane) {
    bits |= static_cast<unsigned>(shown[lane]) << lane;
  }
  return bits;
}

inline unsigned __shfl_up_sync(unsigned, unsigned value, unsigned distance) {
  const unsigned lane = threadIdx.x % cuda_on_cpu::LANES;
  const uint64_t* shown = cuda_on_cpu::Machine::instance().exchange("shfl_up", value);
  return static_cast<unsigned>(shown[lane < distance ? lane : lane - distance]);
}

inline unsigned __shfl_sync(unsigned, unsigned value, unsigned source) {
  return static_cast<unsigned>(cuda_on_cpu::Machine::instance().exchange("shfl", value)[source]);
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address += value;
  return before;
}

inline unsigned atomicOr(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address |= value;
  return before;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <typename To, typename From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

inline unsigned __float_as_uint(float value) { return bits_as<unsigned>(value); }
inline float __int_as_float(int value) { return bits_as<float>(value); }
