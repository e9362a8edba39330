// Forward: sums of weighted taps.

#pragma once

#include "windows.h"

namespace {

// sums[0..C) += weight * window[0..C) over the taps of `count` points from number `at` on. The first time sums count as
// zero, the last time they go to output.
template <int C, int VECTOR_BYTES, int POINTS, typename T, typename A>
ALWAYS_INLINE void gather(
    const A* window, int64_t D, int64_t pitch, const Points<A>& points, int64_t at, int64_t count, A* sums, bool first,
    bool last, T* output) {
  using Ch = Channels<T, A, C, VECTOR_BYTES>;
  using V = typename Ch::V;
  constexpr int M = Ch::M, N = Ch::N;
  // Several sets of accumulators: one alone would wait for its own last addition.
  constexpr int SETS = M >= 8 ? 1 : M >= 4 ? 2 : 4;
  V acc[SETS][M] = {};
  if (!first) {
    Ch::load_raw(acc[0], sums);
  }
  const int64_t n = POINTS > 0 ? POINTS : count;
  for (int64_t i = at; i < at + n; i++) {
    const A* upper = window + points.row[i] * D;
    const A* lower = upper + pitch * D;
    const A* taps[4] = {upper, upper + D, lower, lower + D};
    for (int k = 0; k < 4; k++) {
      const A weight = points.weight[k][i];
      for (int j = 0; j < M; j++) {
        V v;
        load<A, N>(v, taps[k] + j * N);
        acc[k % SETS][j] += v * weight;
      }
    }
  }
  for (int j = 0; j < M; j++) {
    for (int set = 1; set < SETS; set++) {
      acc[0][j] += acc[set][j];
    }
  }
  if (last) {
    Ch::store_all(output, acc[0]);
  } else {
    Ch::store_raw(sums, acc[0]);
  }
}

// Steps that follow each other; all levels of a block and head do. While one is computed, the next one's window is
// filled, a few rows after each run of queries, so that nobody waits for the memory.
template <int VECTOR_BYTES, int POINTS, typename T, typename A>
ALWAYS_INLINE void forward_steps(const Problem<T, A>& p, Scratch<A>& scratch, const std::vector<Step<A>>& steps) {
  Points<A>& points = scratch.points;
  const int64_t D = p.D, stride = p.H * D;
  for (size_t s = 0; s < steps.size(); s++) {
    const Step<A>& step = steps[s];
    const int64_t l = step.level;
    const Level& level = p.levels[l];
    const Window& window = step.block->windows[l];
    const int64_t pitch = pitch_of(window);
    const T* source = p.value + (step.image * p.S * p.H + step.head) * D;
    A* value = scratch.value[s % 2].data();
    if (s == 0) {
      Cursor cursor(level, window);
      load_cells<VECTOR_BYTES>(cursor, cursor.left, source, stride, value, D);
    }
    const Step<A>& next = steps[std::min(s + 1, steps.size() - 1)];
    const T* next_source = p.value + (next.image * p.S * p.H + next.head) * D;
    A* next_value = scratch.value[(s + 1) % 2].data();
    Cursor next_cursor(p.levels[next.level], next.block->windows[next.level]), ahead = next_cursor;
    const int64_t most = std::max<int64_t>(CAPACITY / p.P, 1);
    const int64_t part = next_cursor.left / number_of_runs(*step.block, most) + 1;
    prefetch_cells(ahead, part, next_source, stride, D);
    for (int64_t first = 0; first < p.P; first += CAPACITY) {
      const int64_t count = std::min(p.P - first, CAPACITY);
      for_runs(*step.block, most, [&](int64_t query, int64_t index, int64_t queries) __attribute__((always_inline)) {
        load_cells<VECTOR_BYTES>(next_cursor, part, next_source, stride, next_value, D);
        prefetch_cells(ahead, part, next_source, stride, D);
        const int64_t row = (step.image * p.Q + query) * p.H + step.head;
        read_points<POINTS>(p, row * p.L + l, p.H * p.L, queries, first, count, points);
        place_points<VECTOR_BYTES>(level, window, queries * count, points);
        for_stray_taps(level, window, points, [&](int64_t tap, int64_t token) __attribute__((always_inline)) {
          if (token < 0) {
            std::fill_n(value + tap * D, D, A(0));
          } else {
            load_row<VECTOR_BYTES>(source + token * stride, value + tap * D, D);
          }
        });
        for (int64_t q = 0; q < queries; q++) {
          for_channels(D, [&](auto C, int64_t c) __attribute__((always_inline)) {
            gather<decltype(C)::value, VECTOR_BYTES, POINTS>(
                value + c, D, pitch, points, q * count, count, scratch.sums.data() + (index + q) * D + c,
                l == 0 && first == 0, l + 1 == p.L && first + count == p.P, p.output + (row + q * p.H) * D + c);
          });
        }
      });
    }
    load_cells<VECTOR_BYTES>(next_cursor, next_cursor.left, next_source, stride, next_value, D);
  }
}

}  // namespace
