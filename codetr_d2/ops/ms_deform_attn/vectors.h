// Vectors of numbers, and the channels of a cell in vector registers.

#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../instruction_sets.h"

namespace {

template <typename A, int N>
ALWAYS_INLINE A sum(const Vector<A, N>& v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    Vector<A, N / 2> low, high;
    __builtin_memcpy(&low, &v, sizeof(low));
    __builtin_memcpy(&high, (const char*)&v + sizeof(low), sizeof(high));
    return sum<A, N / 2>(low + high);
  }
}

// The sum of the quarters (of four numbers each) of a vector.
template <typename A, int N>
ALWAYS_INLINE Vector<A, 4> fold(const Vector<A, N>& v) {
  if constexpr (N == 4) {
    return v;
  } else {
    Vector<A, N / 2> low, high;
    __builtin_memcpy(&low, &v, sizeof(low));
    __builtin_memcpy(&high, (const char*)&v + sizeof(low), sizeof(high));
    return fold<A, N / 2>(low + high);
  }
}

// result[i] = the number INDEX::of(i) of two vectors in a row. Results are references: how a vector that the target
// may not have would be returned differs between targets.
template <typename INDEX, typename A, int N, int... I>
ALWAYS_INLINE void pick(
    Vector<A, N>& result, const Vector<A, N>& v, const Vector<A, N>& w, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  result = __builtin_shufflevector(v, w, INDEX::of(I)...);
#else
  result = __builtin_shuffle(v, w, Vector<int32_t, N>{INDEX::of(I)...});
#endif
}

// In each quarter of two vectors of N numbers: one number, or two, in turn from both, from the first or second half.
template <int N, int EACH, int HALF>
struct Interleave {
  static constexpr int of(int i) {
    return i / 4 * 4 + (EACH == 1 ? i % 4 / 2 + i % 2 * N : i % 2 + i % 4 / 2 * N) + 2 * HALF;
  }
};

// result[i], in each quarter: sums over v or w, as Interleave picks them.
template <int EACH, typename A, int N>
ALWAYS_INLINE void add_halves(Vector<A, N>& result, const Vector<A, N>& v, const Vector<A, N>& w) {
  constexpr auto all = std::make_integer_sequence<int, N>();
  Vector<A, N> first, second;
  pick<Interleave<N, EACH, 0>, A, N>(first, v, w, all);
  pick<Interleave<N, EACH, 1>, A, N>(second, v, w, all);
  result = first + second;
}

// sums[0..4) += the sum of each of four vectors; or = where that is asked for.
template <typename A, int N>
ALWAYS_INLINE void four_sums(const Vector<A, N> (&v)[4], A* sums, bool add) {
  if constexpr (N >= 4 && sizeof(A) == 4) {
    Vector<A, N> first, second, both;
    add_halves<1, A, N>(first, v[0], v[1]);
    add_halves<1, A, N>(second, v[2], v[3]);
    add_halves<2, A, N>(both, first, second);
    Vector<A, 4> total = fold<A, N>(both);
    if (add) {
      Vector<A, 4> before;
      load<A, 4>(before, sums);
      total += before;
    }
    store<A, 4>(sums, total);
  } else {
    for (int k = 0; k < 4; k++) {
      sums[k] = sum<A, N>(v[k]) + (add ? sums[k] : A(0));
    }
  }
}

// C neighbouring channels as M vectors of N numbers of type A. bfloat16 is the upper half of a float32: two of them in
// 32 bits become one number in each of two vectors, with a shift and a mask. So the vectors hold the channels in
// another order, which is the same for whatever is multiplied or added.
template <typename T, typename A, int C, int VECTOR_BYTES>
struct Channels {
  static constexpr bool SPLIT = !std::is_same_v<T, A> && C > 1;
  static constexpr int N = std::min<int>(SPLIT ? C / 2 : C, VECTOR_BYTES / sizeof(A));
  static constexpr int M = C / N;
  using V = Vector<A, N>;
  using Bits = Vector<uint32_t, N>;

  static ALWAYS_INLINE void load_all(V (&v)[M], const T* p) {
    if constexpr (SPLIT) {
      for (int j = 0; j < M; j += 2) {
        Bits pairs;
        __builtin_memcpy(&pairs, p + j * N, sizeof(pairs));
        v[j] = (V)(pairs << 16);
        v[j + 1] = (V)(pairs & 0xffff0000u);
      }
    } else if constexpr (std::is_same_v<T, A>) {
      for (int j = 0; j < M; j++) {
        load<A, N>(v[j], p + j * N);
      }
    } else {
      v[0][0] = (A)*p;
    }
  }

  static ALWAYS_INLINE void load_raw(V (&v)[M], const A* p) {
    for (int j = 0; j < M; j++) {
      load<A, N>(v[j], p + j * N);
    }
  }

  static ALWAYS_INLINE void store_raw(A* p, const V (&v)[M]) {
    for (int j = 0; j < M; j++) {
      store<A, N>(p + j * N, v[j]);
    }
  }

  static ALWAYS_INLINE void store_all(T* p, const V (&v)[M]) {
    if constexpr (SPLIT) {
      for (int j = 0; j < M; j += 2) {
        Bits pairs, upper;
        round_bits(pairs, v[j]);
        round_bits(upper, v[j + 1]);
        pairs = (pairs >> 16) | (upper & 0xffff0000u);
        __builtin_memcpy(p + j * N, &pairs, sizeof(pairs));
      }
    } else if constexpr (std::is_same_v<T, A>) {
      for (int j = 0; j < M; j++) {
        store<A, N>(p + j * N, v[j]);
      }
    } else {
      *p = (T)v[0][0];
    }
  }

  // To the nearest bfloat16 in the upper halves, ties to even; what is not a number stays so.
  static ALWAYS_INLINE void round_bits(Bits& result, const V& v) {
    const Bits bits = (Bits)v, nan = (Bits)(v != v);
    result = ((bits + 0x7fffu + ((bits >> 16) & 1u)) & ~nan) | (nan & 0x7fc00000u);
  }
};

}  // namespace
