// One function of each pass for each instruction set.

#pragma once

#include <tuple>
#include <vector>

#include "backward.h"
#include "forward.h"

namespace {

template <typename T, typename A>
using Forward = void (*)(const Problem<T, A>&, Scratch<A>&, const std::vector<Step<A>>&);
template <typename T, typename A>
using Backward = void (*)(const Problem<T, A>&, Scratch<A>&, const std::vector<Step<A>>&, int64_t);
template <typename T, typename A>
using Round = void (*)(const A*, T*, int64_t, int64_t, int64_t);

#define KERNELS(NAME, VECTOR_BYTES, TARGET)                                                                          \
  template <typename T, typename A>                                                                                  \
  TARGET void forward_##NAME(const Problem<T, A>& p, Scratch<A>& scratch, const std::vector<Step<A>>& steps) {       \
    if (p.P == 4) {                                                                                                  \
      forward_steps<VECTOR_BYTES, 4>(p, scratch, steps);                                                             \
    } else {                                                                                                         \
      forward_steps<VECTOR_BYTES, 0>(p, scratch, steps);                                                             \
    }                                                                                                                \
  }                                                                                                                  \
  template <typename T, typename A>                                                                                  \
  TARGET void backward_##NAME(                                                                                       \
      const Problem<T, A>& p, Scratch<A>& scratch, const std::vector<Step<A>>& steps, int64_t target_stride) {       \
    if (p.P == 4) {                                                                                                  \
      backward_steps<VECTOR_BYTES, 4>(p, scratch, steps, target_stride);                                             \
    } else {                                                                                                         \
      backward_steps<VECTOR_BYTES, 0>(p, scratch, steps, target_stride);                                             \
    }                                                                                                                \
  }                                                                                                                  \
  template <typename T, typename A>                                                                                  \
  TARGET void round_##NAME(const A* sums, T* target, int64_t tokens, int64_t D, int64_t stride) {                    \
    round_rows<VECTOR_BYTES>(sums, target, tokens, D, stride);                                                       \
  }

FOR_EACH_INSTRUCTION_SET(KERNELS)

template <typename T, typename A>
std::tuple<Forward<T, A>, Backward<T, A>, Round<T, A>> kernels() {
  return {CHOOSE_KERNEL(forward, T, A), CHOOSE_KERNEL(backward, T, A), CHOOSE_KERNEL(round, T, A)};
}

}  // namespace
