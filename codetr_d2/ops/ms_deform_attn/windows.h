// Filling and emptying windows, and placing the sampling points of some queries in them.

#pragma once

#include <cmath>
#include <limits>

#include "problem.h"

namespace {

template <int VECTOR_BYTES, typename T, typename A>
ALWAYS_INLINE void load_row(const T* source, A* row, int64_t D) {
  for_channels(D, [&](auto C, int64_t c) __attribute__((always_inline)) {
    using Ch = Channels<T, A, decltype(C)::value, VECTOR_BYTES>;
    typename Ch::V v[Ch::M];
    Ch::load_all(v, source + c);
    Ch::store_raw(row + c, v);
  });
}

template <int VECTOR_BYTES, typename A>
ALWAYS_INLINE void add_row(const A* row, A* target, int64_t D) {
  for_channels(D, [&](auto C, int64_t c) __attribute__((always_inline)) {
    using Ch = Channels<A, A, decltype(C)::value, VECTOR_BYTES>;
    typename Ch::V v[Ch::M], w[Ch::M];
    Ch::load_all(v, row + c);
    Ch::load_all(w, target + c);
    for (int j = 0; j < Ch::M; j++) {
      w[j] += v[j];
    }
    Ch::store_all(target + c, w);
  });
}

// Goes through the cells of a window.
struct Cursor {
  Cursor(const Level& level_, const Window& window_)
      : level(level_), window(window_), pitch(pitch_of(window_)), left((int64_t)window_.width * window_.height) {}
  const Level& level;
  const Window& window;
  int64_t pitch, left, x = 0, y = 0;
};

// The next `count` cells: call inside(row in the scratch memory, token) for those in the map, outside(row) for others.
template <typename F, typename G>
ALWAYS_INLINE void next_cells(Cursor& cursor, int64_t count, F inside, G outside) {
  const Window& window = cursor.window;
  count = std::min(count, cursor.left);
  cursor.left -= count;
  while (count > 0) {
    // Up to the end of the window's line: [begin, first) before the map, [first, last) in it, [last, end) behind it.
    const int64_t begin = cursor.x, end = std::min<int64_t>(window.width, begin + count);
    const int64_t map_y = window.y0 + cursor.y, row = cursor.y * cursor.pitch;
    const bool in_map = map_y >= 0 && map_y < cursor.level.height;
    const int64_t first = in_map ? std::clamp<int64_t>(-window.x0, begin, end) : end;
    const int64_t last = in_map ? std::clamp<int64_t>(cursor.level.width - window.x0, first, end) : end;
    const int64_t token = cursor.level.start + map_y * cursor.level.width + window.x0;
    for (int64_t x = begin; x < first; x++) {
      outside(row + x);
    }
    for (int64_t x = first; x < last; x++) {
      inside(row + x, token + x);
    }
    for (int64_t x = last; x < end; x++) {
      outside(row + x);
    }
    count -= end - begin;
    cursor.x = end;
    if (end == window.width) {
      cursor.x = 0;
      cursor.y++;
    }
  }
}

// The next `count` rows of a window's values.
template <int VECTOR_BYTES, typename T, typename A>
ALWAYS_INLINE void load_cells(Cursor& cursor, int64_t count, const T* source, int64_t stride, A* window, int64_t D) {
  next_cells(
      cursor, count,
      [&](int64_t row, int64_t token) __attribute__((always_inline)) {
        load_row<VECTOR_BYTES>(source + token * stride, window + row * D, D);
      },
      [&](int64_t row) __attribute__((always_inline)) { std::fill_n(window + row * D, D, A(0)); });
}

template <typename T>
ALWAYS_INLINE void prefetch_cells(Cursor& cursor, int64_t count, const T* source, int64_t stride, int64_t D) {
  next_cells(
      cursor, count,
      [&](int64_t, int64_t token) __attribute__((always_inline)) {
        for (int64_t c = 0; c < D; c += 64 / sizeof(T)) {
          __builtin_prefetch(source + token * stride + c);
        }
      },
      [](int64_t) {});
}

// Add the next `count` rows of a window to their targets, and make them zero.
template <int VECTOR_BYTES, typename A>
ALWAYS_INLINE void add_cells(Cursor& cursor, int64_t count, A* window, A* target, int64_t stride, int64_t D) {
  next_cells(
      cursor, count,
      [&](int64_t row, int64_t token) __attribute__((always_inline)) {
        add_row<VECTOR_BYTES>(window + row * D, target + token * stride, D);
        std::fill_n(window + row * D, D, A(0));
      },
      [&](int64_t row) __attribute__((always_inline)) { std::fill_n(window + row * D, D, A(0)); });
}

// Call f(row in the scratch memory, token or -1 outside the map) for the taps of all strays.
template <typename A, typename F>
ALWAYS_INLINE void for_stray_taps(const Level& level, const Window& window, const Points<A>& points, F f) {
  const int64_t pitch = pitch_of(window);
  for (int64_t j = 0; j < points.num_strays; j++) {
    const int32_t i = points.stray[j];
    for (int k = 0; k < 4; k++) {
      const int64_t x = (int64_t)points.x0[i] + k % 2, y = (int64_t)points.y0[i] + k / 2;
      const bool in_map = x >= 0 && x < level.width && y >= 0 && y < level.height;
      f(points.row[i] + k / 2 * pitch + k % 2, in_map ? level.start + y * level.width + x : -1);
    }
  }
}

// Read locations and weights of points [first, first + count) of a level, for some queries that follow each other. The
// first query's begin at `row`, counted in levels; those of the next follow `step` later.
template <int POINTS, typename T, typename A>
ALWAYS_INLINE void read_points(
    const Problem<T, A>& p, int64_t row, int64_t step, int64_t queries, int64_t first, int64_t count,
    Points<A>& points) {
  for (int64_t q = 0; q < queries; q++) {
    const int64_t point = (row + q * step) * p.P + first;
    // The next level's, or the next head's: what the next step reads.
    __builtin_prefetch(p.locations + 2 * (point + p.P), 0, 2);
    __builtin_prefetch(p.weights + point + p.P, 0, 2);
    if constexpr (POINTS > 0) {
      std::memcpy(points.location[q * POINTS], p.locations + 2 * point, 2 * POINTS * sizeof(A));
      std::memcpy(points.attention + q * POINTS, p.weights + point, POINTS * sizeof(A));
    } else {
      for (int64_t i = 0; i < count; i++) {
        points.location[q * count + i][0] = p.locations[2 * (point + i)];
        points.location[q * count + i][1] = p.locations[2 * (point + i) + 1];
        points.attention[q * count + i] = p.weights[point + i];
      }
    }
  }
}

// Fill x0, y0, row, x, y and weight of `count` points; the strays get rows behind the window.
template <int VECTOR_BYTES, typename A>
ALWAYS_INLINE void place_points(const Level& level, const Window& window, int64_t count, Points<A>& points) {
  constexpr int N = VECTOR_BYTES / sizeof(A);
  // Whole numbers of the size of A, or the loop does not vectorise.
  using Int = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  using Unsigned = std::make_unsigned_t<Int>;
  const A width = level.width, height = level.height;
  const Int pitch = pitch_of(window), left = window.x0, top = window.y0;
  const Unsigned columns = std::max(window.width - 1, 0), rows = std::max(window.height - 1, 0);
  Points<A>& __restrict t = points;
  // Whole vectors: what follows the last point is computed, and not used.
  for (int64_t begin = 0; begin < count; begin += N) {
#pragma GCC ivdep
    for (int64_t i = begin; i < begin + N; i++) {
      A x = t.location[i][0] * width - A(0.5);
      A y = t.location[i][1] * height - A(0.5);
      // To just outside the map what lies further outside, is infinite or (all comparisons false) not a number.
      x = x > A(-2) ? x : A(-2);
      y = y > A(-2) ? y : A(-2);
      x = x < width ? x : width;
      y = y < height ? y : height;
      Int x0 = (Int)x, y0 = (Int)y;  // rounds towards zero
      x0 -= x < (A)x0;
      y0 -= y < (A)y0;
      const A right = x - (A)x0, lower = y - (A)y0;
      const Int u = x0 - left, v = y0 - top;
      const Int out = -(Int)((Unsigned)u >= columns) | -(Int)((Unsigned)v >= rows);
      t.row[i] = (v * pitch + u) | out;
      t.x0[i] = x0;
      t.y0[i] = y0;
      t.x[i] = right;
      t.y[i] = lower;
      const A above = t.attention[i] * (A(1) - lower), below = t.attention[i] * lower;
      t.weight[0][i] = above * (A(1) - right);
      t.weight[1][i] = above * right;
      t.weight[2][i] = below * (A(1) - right);
      t.weight[3][i] = below * right;
    }
  }
  t.num_strays = 0;
  for (int64_t i = 0; i < count; i++) {
    if (t.row[i] < 0) {
      const int64_t strays = pitch / 2, j = t.num_strays++;
      t.stray[j] = i;
      t.row[i] = (window.height + j / strays * 2) * pitch + j % strays * 2;
    }
  }
}

// Call f(query, index among the block's queries, how many) for runs of at most `most` queries that follow each other.
template <typename F>
ALWAYS_INLINE void for_runs(const Block& block, int64_t most, F f) {
  int64_t index = 0;
  for (const Queries& queries : block.queries) {
    const int64_t runs = (queries.columns + most - 1) / most;
    for (int64_t run = 0; run < runs; run++) {
      const int64_t begin = queries.columns * run / runs, end = queries.columns * (run + 1) / runs;
      for (int64_t y = 0; y < queries.rows; y++) {
        f(queries.first + y * queries.pitch + begin, index, end - begin);
        index += end - begin;
      }
    }
  }
}

// How often for_runs calls.
inline int64_t number_of_runs(const Block& block, int64_t most) {
  int64_t runs = 0;
  for (const Queries& queries : block.queries) {
    runs += (queries.columns + most - 1) / most * queries.rows;
  }
  return runs;
}

}  // namespace
