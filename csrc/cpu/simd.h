// One binary for every machine: the compiler makes a copy of each marked loop per vector extension, and the loader picks
// the one that the processor can run. Elsewhere (aarch64, musl) the baseline vector unit is used.
#pragma once

#include <cstdint>  // and with it __GLIBC__, where the C library is glibc

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define YOLOV4_FAST_MULTIVERSION \
  __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define YOLOV4_FAST_MULTIVERSION
#endif

// For the body of a marked function: it must be inlined into each copy to be compiled for its extension.
#define YOLOV4_FAST_INLINE inline __attribute__((always_inline))
