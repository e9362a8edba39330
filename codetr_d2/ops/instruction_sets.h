// Vectors of any size, and kernels of which each instruction set has its own, chosen when called.
//
// A kernel is a template on the size of its vectors, forced inline into one function for each instruction set. Nothing
// is compiled for the building machine alone.

#pragma once

#include <ATen/Version.h>

#include <cstdint>
#include <string>
#include <type_traits>

#if !defined(__GNUC__)
#error "this file needs the vector extensions of GCC or Clang"
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

// FOR_EACH_INSTRUCTION_SET(KERNELS) expands KERNELS(NAME, VECTOR_BYTES, TARGET), which defines functions f_NAME, for each
// one; CHOOSE_KERNEL(f, T...) is the f_NAME<T...> to call here.
#if defined(__x86_64__)
#define FOR_EACH_INSTRUCTION_SET(KERNELS)                     \
  KERNELS(baseline, 16, )                                     \
  KERNELS(avx2, 32, __attribute__((target("avx2,fma"))))      \
  KERNELS(avx512, 64, __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))))
#define CHOOSE_KERNEL(F, ...)                                        \
  (instruction_set() == "AVX512"     ? &F##_avx512<__VA_ARGS__>      \
       : instruction_set() == "AVX2" ? &F##_avx2<__VA_ARGS__>        \
                                     : &F##_baseline<__VA_ARGS__>)
#else
#define FOR_EACH_INSTRUCTION_SET(KERNELS) KERNELS(baseline, 16, )
#define CHOOSE_KERNEL(F, ...) (&F##_baseline<__VA_ARGS__>)
#endif

// "AVX512", "AVX2" or else. PyTorch's own choice, so that ATEN_CPU_CAPABILITY holds here too.
inline std::string instruction_set() {
#if defined(__x86_64__)
  static const std::string name = at::get_cpu_capability();
  if (name == "AVX512" || name == "AVX2") {
    return name;
  }
#endif
  return "baseline";
}

// N numbers of type A, without any demand on alignment: they are loaded and stored with memcpy.
template <typename A, int N>
struct VectorOf {
  typedef A type __attribute__((vector_size(N * sizeof(A))));
};
template <typename A, int N>
using Vector = typename VectorOf<A, N>::type;

template <typename A, int N>
ALWAYS_INLINE void load(Vector<A, N>& v, const A* p) {
  __builtin_memcpy(&v, p, sizeof(v));
}

template <typename A, int N>
ALWAYS_INLINE void store(A* p, const Vector<A, N>& v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// Call f(C, c), C a type that holds the number of channels, for the blocks of channels that make up all D.
template <typename F>
ALWAYS_INLINE void for_channels(int64_t D, F f) {
  int64_t c = 0;
  for (; c + 64 <= D; c += 64) {
    f(std::integral_constant<int, 64>(), c);
  }
  for (; c + 32 <= D; c += 32) {
    f(std::integral_constant<int, 32>(), c);
  }
  for (; c + 8 <= D; c += 8) {
    f(std::integral_constant<int, 8>(), c);
  }
  for (; c < D; c++) {
    f(std::integral_constant<int, 1>(), c);
  }
}
