// Multi-scale deformable attention on the CPU, forward and backward.
//
// Every sampling point reads four taps, the neighbouring cells of its location, each of them D contiguous channels. In
// memory the taps of one head are H * D numbers apart. That is mostly a power of two, and then they share a few sets of
// the cache, which forgets them at once. So the work is cut into steps of some neighbouring queries, one head and one
// level, and the part of the map that these queries most likely sample is copied into a window, where its cells lie
// without gaps. Cells outside the map are zero there. A point that lies outside the window, a stray, gets copies of its
// taps behind it. So the inner loops have no branch and never read what they must not.
//
// The points of some queries are first placed all together (a loop that vectorises over points), then each query runs
// over its taps with the accumulators in vector registers (vectorised over channels). In the backward pass a second
// window takes the gradients, which are added to the map's afterwards. Windows are filled and emptied while other steps
// are computed, with prefetches ahead, for memory and not arithmetic is what limits all this.
//
// The kernels are templates on the vector size, forced inline into one function for each instruction set; which
// of them runs is decided when called. Nothing is compiled for the building machine alone.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "instruction_sets.h"

namespace {

using at::Tensor;

// ---------------------------------------------------------------- vectors

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

// ---------------------------------------------------------------- channels

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

// ---------------------------------------------------------------- the problem

// Level of the feature maps: its size and first token.
struct Level {
  int32_t height, width;
  int64_t start;
};

// value [B, S, H, D], locations [B, Q, H, L, P, 2] and weights [B, Q, H, L, P], output [B, Q, H, D].
template <typename T, typename A>
struct Problem {
  int64_t B, S, H, D, Q, L, P;
  const Level* levels;
  const T* value;
  const A* locations;
  const A* weights;
  T* output;

  // Backward only.
  const T* grad_output;
  T* grad_value;
  A* grad_locations;
  A* grad_weights;
};

// Queries first + y * pitch + x of an image, y < rows, x < columns.
struct Queries {
  int64_t first, rows, columns, pitch;
};

// Cells (y0 + y, x0 + x) of a map, y < height, x < width. It may reach two cells beyond the map, where all is zero.
struct Window {
  int32_t x0, y0, width, height;
};

// What is computed in one go: some queries, and for each level the part of the map that they most likely sample.
struct Block {
  std::vector<Queries> queries;
  std::vector<Window> windows;
};

constexpr int64_t CAPACITY = 64;   // points at a time
constexpr int64_t MIN_PITCH = 32;  // cells from one line of a window to the next

inline int64_t pitch_of(const Window& window) {
  return std::max<int64_t>(window.width, MIN_PITCH);
}

// In the scratch memory each cell has a row of D numbers. Behind a window's cells follow 2 x 2 for each of CAPACITY
// strays, in lines of the same pitch.
inline int64_t rows_of(const Window& window) {
  const int64_t pitch = pitch_of(window), strays = pitch / 2;
  return pitch * (window.height + 2 * ((CAPACITY + strays - 1) / strays));
}

// Points of neighbouring queries, in one level and head.
template <typename A>
struct Points {
  alignas(64) A location[CAPACITY][2];
  A attention[CAPACITY];
  int32_t x0[CAPACITY], y0[CAPACITY];  // the upper left tap: its cell in the map
  int32_t row[CAPACITY];               // and its row in the scratch memory, -1 outside the window
  A x[CAPACITY], y[CAPACITY];          // position inside the cell, 0..1
  A weight[4][CAPACITY];               // of taps (y, x), (y, x+1), (y+1, x), (y+1, x+1): bilinear times attention
  A dot[CAPACITY][4];                  // <value of the tap, gradient of the output>
  A grad_location[CAPACITY][2];
  A grad_attention[CAPACITY];
  int32_t stray[CAPACITY];
  int64_t num_strays;
};

// Numbers that begin where a cache line does: a vector in two of them takes twice as long to load.
template <typename A>
class Aligned {
 public:
  explicit Aligned(int64_t size) : memory_(size + 64 / sizeof(A)) {}
  A* data() {
    return (A*)(((uintptr_t)memory_.data() + 63) / 64 * 64);
  }

 private:
  std::vector<A> memory_;
};

// What a thread works in: windows of `rows` rows, with gradients in the backward pass, and sums of `queries` queries.
// There are two windows: while one is in use, another is filled or emptied.
template <typename A>
struct Scratch {
  Scratch(int64_t rows, int64_t grad_rows, int64_t queries, int64_t D)
      : value{Aligned<A>(rows * D), Aligned<A>(rows * D)},
        grad_value{Aligned<A>(grad_rows * D), Aligned<A>(grad_rows * D)},
        sums(queries * D) {}
  Points<A> points{};
  Aligned<A> value[2];
  Aligned<A> grad_value[2];  // zero when not in use
  Aligned<A> sums;
};

// One level and head of a block. `target` is the gradient of the image's first token in this head.
template <typename A>
struct Step {
  const Block* block;
  int64_t image, head, level;
  A* target;
};

// ---------------------------------------------------------------- windows

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

// ---------------------------------------------------------------- points

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

// ---------------------------------------------------------------- forward

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

// ---------------------------------------------------------------- backward

// For the taps of `count` points from number `at` on: grad_window[0..C) += weight * grad_output[0..C), and
// dot += <window[0..C), grad_output[0..C)>, or = where it is the first time.
template <int C, int VECTOR_BYTES, int POINTS, typename T, typename A>
ALWAYS_INLINE void scatter(
    const A* window, A* grad_window, int64_t D, int64_t pitch, int64_t at, int64_t count, const T* grad_output,
    bool first, Points<A>& points) {
  using Ch = Channels<T, A, C, VECTOR_BYTES>;
  using V = typename Ch::V;
  constexpr int M = Ch::M, N = Ch::N;
  V grad[M];
  Ch::load_all(grad, grad_output);
  const int64_t n = POINTS > 0 ? POINTS : count;
  for (int64_t i = at; i < at + n; i++) {
    const int64_t upper = points.row[i] * D, lower = upper + pitch * D;
    const int64_t taps[4] = {upper, upper + D, lower, lower + D};
    V partial[4];
    for (int k = 0; k < 4; k++) {
      const A weight = points.weight[k][i];
      for (int j = 0; j < M; j++) {
        V v, g;
        load<A, N>(v, window + taps[k] + j * N);
        partial[k] = j == 0 ? v * grad[j] : partial[k] + v * grad[j];
        load<A, N>(g, grad_window + taps[k] + j * N);
        g += grad[j] * weight;
        store<A, N>(grad_window + taps[k] + j * N, g);
      }
    }
    four_sums<A, N>(partial, points.dot[i], !first);
  }
}

template <int VECTOR_BYTES, typename A>
ALWAYS_INLINE void gradients(const Level& level, int64_t count, Points<A>& points) {
  constexpr int N = VECTOR_BYTES / sizeof(A);
  const A width = level.width, height = level.height;
  Points<A>& __restrict t = points;
  for (int64_t begin = 0; begin < count; begin += N) {
#pragma GCC ivdep
    for (int64_t i = begin; i < begin + N; i++) {
      const A x = t.x[i], y = t.y[i];
      const A d00 = t.dot[i][0], d01 = t.dot[i][1], d10 = t.dot[i][2], d11 = t.dot[i][3];
      const A along_x = (A(1) - y) * (d01 - d00) + y * (d11 - d10);
      const A along_y = (A(1) - x) * (d10 - d00) + x * (d11 - d01);
      const A upper = (A(1) - x) * d00 + x * d01, lower = (A(1) - x) * d10 + x * d11;
      t.grad_attention[i] = (A(1) - y) * upper + y * lower;
      t.grad_location[i][0] = t.attention[i] * width * along_x;
      t.grad_location[i][1] = t.attention[i] * height * along_y;
    }
  }
}

template <int POINTS, typename T, typename A>
ALWAYS_INLINE void write_gradients(
    const Problem<T, A>& p, int64_t row, int64_t step, int64_t queries, int64_t first, int64_t count,
    const Points<A>& points) {
  for (int64_t q = 0; q < queries; q++) {
    const int64_t point = (row + q * step) * p.P + first;
    if constexpr (POINTS > 0) {
      std::memcpy(p.grad_locations + 2 * point, points.grad_location[q * POINTS], 2 * POINTS * sizeof(A));
      std::memcpy(p.grad_weights + point, points.grad_attention + q * POINTS, POINTS * sizeof(A));
    } else {
      for (int64_t i = 0; i < count; i++) {
        p.grad_locations[2 * (point + i)] = points.grad_location[q * count + i][0];
        p.grad_locations[2 * (point + i) + 1] = points.grad_location[q * count + i][1];
        p.grad_weights[point + i] = points.grad_attention[q * count + i];
      }
    }
  }
}

// As in forward_steps. While one step is computed, too, the gradients of the one before are added to their targets,
// where tokens are `target_stride` apart.
template <int VECTOR_BYTES, int POINTS, typename T, typename A>
ALWAYS_INLINE void backward_steps(
    const Problem<T, A>& p, Scratch<A>& scratch, const std::vector<Step<A>>& steps, int64_t target_stride) {
  Points<A>& points = scratch.points;
  const int64_t D = p.D, stride = p.H * D;
  for (size_t s = 0; s < steps.size(); s++) {
    const Step<A>& step = steps[s];
    const int64_t l = step.level;
    const Level& level = p.levels[l];
    const Window& window = step.block->windows[l];
    const int64_t pitch = pitch_of(window);
    const T* source = p.value + (step.image * p.S * p.H + step.head) * D;
    A *value = scratch.value[s % 2].data(), *grad_value = scratch.grad_value[s % 2].data();
    if (s == 0) {
      Cursor cursor(level, window);
      load_cells<VECTOR_BYTES>(cursor, cursor.left, source, stride, value, D);
    }
    const Step<A>& next = steps[std::min(s + 1, steps.size() - 1)];
    const T* next_source = p.value + (next.image * p.S * p.H + next.head) * D;
    A* next_value = scratch.value[(s + 1) % 2].data();
    Cursor next_cursor(p.levels[next.level], next.block->windows[next.level]), ahead = next_cursor;
    const Step<A>& last = steps[s == 0 ? 0 : s - 1];
    A* last_grad = scratch.grad_value[(s + 1) % 2].data();
    Cursor last_cursor(p.levels[last.level], last.block->windows[last.level]), last_ahead = last_cursor;
    const int64_t most = std::max<int64_t>(CAPACITY / p.P, 1), runs = number_of_runs(*step.block, most);
    const int64_t part = next_cursor.left / runs + 1, last_part = last_cursor.left / runs + 1;
    if (s == 0) {
      last_cursor.left = last_ahead.left = 0;
    } else if (last.target == step.target && last.level == l) {  // the order of additions stays the same
      add_cells<VECTOR_BYTES>(last_cursor, last_cursor.left, last_grad, last.target, target_stride, D);
      last_ahead.left = 0;
    }
    prefetch_cells(ahead, part, next_source, stride, D);
    prefetch_cells(last_ahead, last_part, last.target, target_stride, D);
    for (int64_t first = 0; first < p.P; first += CAPACITY) {
      const int64_t count = std::min(p.P - first, CAPACITY);
      for_runs(*step.block, most, [&](int64_t query, int64_t, int64_t queries) __attribute__((always_inline)) {
        load_cells<VECTOR_BYTES>(next_cursor, part, next_source, stride, next_value, D);
        add_cells<VECTOR_BYTES>(last_cursor, last_part, last_grad, last.target, target_stride, D);
        prefetch_cells(ahead, part, next_source, stride, D);
        prefetch_cells(last_ahead, last_part, last.target, target_stride, D);
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
            scatter<decltype(C)::value, VECTOR_BYTES, POINTS>(
                value + c, grad_value + c, D, pitch, q * count, count, p.grad_output + (row + q * p.H) * D + c, c == 0,
                points);
          });
        }
        if (l + 1 == p.L) {  // the next head's, too
          for (int64_t q = 0; q < queries; q++) {
            for (int64_t c = 0; c < D; c += 64 / sizeof(T)) {
              __builtin_prefetch(p.grad_output + (row + q * p.H + 1) * D + c, 0, 2);
            }
          }
        }
        gradients<VECTOR_BYTES>(level, queries * count, points);
        write_gradients<POINTS>(p, row * p.L + l, p.H * p.L, queries, first, count, points);
        for_stray_taps(level, window, points, [&](int64_t tap, int64_t token) __attribute__((always_inline)) {
          if (token >= 0) {
            add_row<VECTOR_BYTES>(grad_value + tap * D, step.target + token * target_stride, D);
          }
          std::fill_n(grad_value + tap * D, D, A(0));
        });
      });
    }
    load_cells<VECTOR_BYTES>(next_cursor, next_cursor.left, next_source, stride, next_value, D);
    add_cells<VECTOR_BYTES>(last_cursor, last_cursor.left, last_grad, last.target, target_stride, D);
    if (s + 1 == steps.size()) {
      Cursor cursor(level, window);
      add_cells<VECTOR_BYTES>(cursor, cursor.left, grad_value, step.target, target_stride, D);
    }
  }
}

// Round sums, whose channels are in the order of Channels, to rows of the target that are `stride` numbers apart.
template <int VECTOR_BYTES, typename T, typename A>
ALWAYS_INLINE void round_rows(const A* sums, T* target, int64_t tokens, int64_t D, int64_t stride) {
  for (int64_t token = 0; token < tokens; token++) {
    for_channels(D, [&](auto C, int64_t c) __attribute__((always_inline)) {
      using Ch = Channels<T, A, decltype(C)::value, VECTOR_BYTES>;
      typename Ch::V v[Ch::M];
      Ch::load_raw(v, sums + token * D + c);
      Ch::store_all(target + token * stride + c, v);
    });
  }
}

// ---------------------------------------------------------------- one function for each instruction set

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

// ---------------------------------------------------------------- checks and set-up

// What a thread's windows may take, if they can be made that small: they must stay in the second-level cache.
constexpr int64_t WINDOW_BYTES = 768 << 10;
// Cells about the queries' own that belong to the window, too. More strays, or larger windows, both cost time.
constexpr int64_t HALO = 7;

// Blocks that make up all queries. If there are as many queries as tokens, this most likely is self-attention of the
// tokens, which sample about their own places: then a block is one part of the image in all levels, with windows about
// it. Otherwise queries are taken as they come, and windows are empty: every point is a stray. `cell_bytes` is what a
// cell takes in all windows that a thread has at the same time.
std::vector<Block> make_blocks(const std::vector<Level>& levels, int64_t S, int64_t Q, int64_t cell_bytes) {
  const int64_t side = std::sqrt((double)WINDOW_BYTES / std::max<int64_t>(cell_bytes, 1));
  const int64_t tile = std::clamp<int64_t>(side - 2 * HALO, 8, 32);
  int64_t down = 1, across = 1;
  for (const Level& level : levels) {
    down = std::max(down, (level.height + tile - 1) / tile);
    across = std::max(across, (level.width + tile - 1) / tile);
  }
  std::vector<Block> blocks;
  if (Q != S || down > S / across) {  // so many parts have only maps that don't resemble each other
    for (int64_t first = 0; first < Q; first += CAPACITY) {
      blocks.push_back({{{first, 1, std::min(CAPACITY, Q - first), 0}}, std::vector<Window>(levels.size())});
    }
    return blocks;
  }
  for (int64_t j = 0; j < down; j++) {
    for (int64_t i = 0; i < across; i++) {
      Block block;
      bool empty = true;
      for (const Level& level : levels) {
        const int64_t y0 = level.height * j / down, y1 = level.height * (j + 1) / down;
        const int64_t x0 = level.width * i / across, x1 = level.width * (i + 1) / across;
        empty = empty && (y0 == y1 || x0 == x1);
        block.queries.push_back({level.start + y0 * level.width + x0, y1 - y0, x1 - x0, level.width});
        const int64_t left = std::max<int64_t>(x0 - HALO, -2), right = std::min<int64_t>(x1 + HALO, level.width + 2);
        const int64_t top = std::max<int64_t>(y0 - HALO, -2), bottom = std::min<int64_t>(y1 + HALO, level.height + 2);
        block.windows.push_back({(int32_t)left, (int32_t)top, (int32_t)(right - left), (int32_t)(bottom - top)});
      }
      if (!empty) {
        blocks.push_back(std::move(block));
      }
    }
  }
  return blocks;
}

// Owns what a Problem points to, beside the tensors.
template <typename T, typename A>
struct Prepared {
  Tensor value, locations, weights;
  std::vector<Level> levels;
  std::vector<Block> blocks;
  int64_t window_rows = 0, block_queries = 0;  // the most that a block has
  Problem<T, A> problem{};

  Prepared(
      const Tensor& value_, const Tensor& shapes, const Tensor& starts, const Tensor& locations_,
      const Tensor& weights_, int64_t num_windows) {
    const auto type = c10::CppTypeToScalarType<A>::value;
    value = value_.contiguous();
    locations = locations_.to(type).contiguous();
    weights = weights_.to(type).contiguous();
    for (int64_t l = 0; l < shapes.size(0); l++) {
      levels.push_back(
          {(int32_t)shapes[l][0].item<int64_t>(), (int32_t)shapes[l][1].item<int64_t>(), starts[l].item<int64_t>()});
    }
    problem.B = value.size(0);
    problem.S = value.size(1);
    problem.H = value.size(2);
    problem.D = value.size(3);
    problem.Q = locations.size(1);
    problem.L = levels.size();
    problem.P = locations.size(4);
    problem.levels = levels.data();
    problem.value = value.const_data_ptr<T>();
    problem.locations = locations.template const_data_ptr<A>();
    problem.weights = weights.template const_data_ptr<A>();
    blocks = make_blocks(levels, problem.S, problem.Q, num_windows * problem.D * sizeof(A));
    for (const Block& block : blocks) {
      int64_t count = 0;
      for (const Queries& queries : block.queries) {
        count += queries.rows * queries.columns;
      }
      block_queries = std::max(block_queries, count);
      for (const Window& window : block.windows) {
        window_rows = std::max(window_rows, rows_of(window));
      }
    }
  }
};

void check(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights) {
  for (const Tensor& tensor : {value, spatial_shapes, level_start_index, sampling_locations, attention_weights}) {
    TORCH_CHECK(tensor.device().is_cpu(), "ms_deform_attn: a tensor is on ", tensor.device(), ", expected the CPU");
  }
  TORCH_CHECK(value.dim() == 4, "ms_deform_attn: value must be [B, S, heads, D], got ", value.sizes());
  TORCH_CHECK(
      spatial_shapes.dim() == 2 && spatial_shapes.size(1) == 2 && spatial_shapes.scalar_type() == at::kLong,
      "ms_deform_attn: spatial_shapes must be int64 [L, 2], got ", spatial_shapes.scalar_type(), " ",
      spatial_shapes.sizes());
  const int64_t num_levels = spatial_shapes.size(0);
  TORCH_CHECK(
      level_start_index.dim() == 1 && level_start_index.size(0) == num_levels &&
          level_start_index.scalar_type() == at::kLong,
      "ms_deform_attn: level_start_index must be int64 [", num_levels, "], got ", level_start_index.scalar_type(), " ",
      level_start_index.sizes());
  TORCH_CHECK(
      sampling_locations.dim() == 6 && sampling_locations.size(0) == value.size(0) &&
          sampling_locations.size(2) == value.size(2) && sampling_locations.size(3) == num_levels &&
          sampling_locations.size(5) == 2,
      "ms_deform_attn: sampling_locations must be [", value.size(0), ", Q, ", value.size(2), ", ", num_levels,
      ", P, 2] to fit value and spatial_shapes, got ", sampling_locations.sizes());
  TORCH_CHECK(
      attention_weights.sizes() == sampling_locations.sizes().slice(0, 5),
      "ms_deform_attn: attention_weights must be ", sampling_locations.sizes().slice(0, 5),
      " to fit sampling_locations, got ", attention_weights.sizes());
  TORCH_CHECK(
      sampling_locations.is_floating_point() && attention_weights.is_floating_point(),
      "ms_deform_attn: sampling_locations and attention_weights must be floating point");
  TORCH_CHECK(
      value.size(1) < std::numeric_limits<int32_t>::max() / 2, "ms_deform_attn: too many tokens: ", value.size(1));
  int64_t tokens = 0;
  for (int64_t l = 0; l < num_levels; l++) {
    const int64_t height = spatial_shapes[l][0].item<int64_t>(), width = spatial_shapes[l][1].item<int64_t>();
    TORCH_CHECK(height >= 0 && width >= 0, "ms_deform_attn: level ", l, " has a negative size");
    TORCH_CHECK(
        level_start_index[l].item<int64_t>() == tokens, "ms_deform_attn: level ", l, " must start at token ", tokens,
        ", got level_start_index ", level_start_index[l].item<int64_t>());
    TORCH_CHECK(
        height <= value.size(1) && (height == 0 || width <= (value.size(1) - tokens) / height),
        "ms_deform_attn: level ", l, " of size ", height, " x ", width, " does not fit the ", value.size(1),
        " tokens of value");
    tokens += height * width;
  }
  TORCH_CHECK(
      tokens == value.size(1), "ms_deform_attn: spatial_shapes hold ", tokens, " tokens, value has ", value.size(1));
}

// Call f<T, A>(): the type of the value, and the type to compute in.
#define DISPATCH(TYPE, ...)                                                                                          \
  switch (TYPE) {                                                                                                    \
    case at::kFloat: {                                                                                               \
      using T = float;                                                                                               \
      using A = float;                                                                                               \
      return __VA_ARGS__;                                                                                            \
    }                                                                                                                \
    case at::kDouble: {                                                                                              \
      using T = double;                                                                                              \
      using A = double;                                                                                              \
      return __VA_ARGS__;                                                                                            \
    }                                                                                                                \
    case at::kBFloat16: {                                                                                            \
      using T = c10::BFloat16;                                                                                       \
      using A = float;                                                                                               \
      return __VA_ARGS__;                                                                                            \
    }                                                                                                                \
    default:                                                                                                         \
      TORCH_CHECK(false, "ms_deform_attn: value must be float32, bfloat16 or float64, got ", TYPE);                  \
  }

template <typename T, typename A>
Tensor forward_typed(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights) {
  Prepared<T, A> prepared(
      value, spatial_shapes, level_start_index, sampling_locations, attention_weights, 2);
  Problem<T, A>& p = prepared.problem;
  Tensor output = at::empty({p.B, p.Q, p.H * p.D}, value.options().memory_format(at::MemoryFormat::Contiguous));
  p.output = output.template mutable_data_ptr<T>();
  if (p.L * p.P == 0) {
    return output.zero_();
  }
  const auto kernel = std::get<0>(kernels<T, A>());
  const std::vector<Block>& blocks = prepared.blocks;
  const int64_t count = blocks.size();
  at::parallel_for(0, p.B * count * p.H, 1, [&](int64_t begin, int64_t end) {
    Scratch<A> scratch(prepared.window_rows, 0, prepared.block_queries, p.D);
    std::vector<Step<A>> steps;
    for (int64_t i = begin; i < end; i++) {
      for (int64_t l = 0; l < p.L; l++) {
        steps.push_back({&blocks[i / p.H % count], i / p.H / count, i % p.H, l, nullptr});
      }
    }
    kernel(p, scratch, steps);
  });
  return output;
}

template <typename T, typename A>
std::tuple<Tensor, Tensor, Tensor> backward_typed(
    const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights) {
  Prepared<T, A> prepared(
      value, spatial_shapes, level_start_index, sampling_locations, attention_weights, 4);
  Problem<T, A>& p = prepared.problem;
  const Tensor grad = grad_output.to(value.scalar_type()).contiguous();
  p.grad_output = grad.template const_data_ptr<T>();
  Tensor grad_value = at::zeros_like(prepared.value);
  Tensor grad_locations = at::empty_like(prepared.locations), grad_weights = at::empty_like(prepared.weights);
  p.grad_value = grad_value.template mutable_data_ptr<T>();
  p.grad_locations = grad_locations.template mutable_data_ptr<A>();
  p.grad_weights = grad_weights.template mutable_data_ptr<A>();
  if (p.L * p.P == 0) {
    return {grad_value, grad_locations.to(sampling_locations.scalar_type()),
            grad_weights.to(attention_weights.scalar_type())};
  }
  const auto kernel = std::get<1>(kernels<T, A>());
  const auto round = std::get<2>(kernels<T, A>());
  const std::vector<Block>& blocks = prepared.blocks;
  // Heads never share a gradient, nor do levels: split by level too where the heads don't share out evenly.
  const int64_t groups = p.B * p.H % at::get_num_threads() == 0 ? 1 : p.L, step = p.L / groups;
  const int64_t items = p.H * groups;
  at::parallel_for(0, p.B * items, 1, [&](int64_t begin, int64_t end) {
    Scratch<A> scratch(prepared.window_rows, prepared.window_rows, 0, p.D);
    std::vector<A> sums(std::is_same_v<T, A> ? 0 : p.S * p.D);
    std::vector<Step<A>> steps;
    while (begin < end) {
      const int64_t image = begin / items;
      T* image_grad = p.grad_value + image * p.S * p.H * p.D;
      // All items of the image in turn. In bfloat16 one at a time, into sums of full precision.
      const int64_t stop = std::is_same_v<T, A> ? std::min(end, (image + 1) * items) : begin + 1;
      steps.clear();
      for (const Block& block : blocks) {
        for (int64_t item = begin; item < stop; item++) {
          const int64_t head = item % items / groups, first = item % groups * step;
          A* target = sums.data();
          if constexpr (std::is_same_v<T, A>) {
            target = image_grad + head * p.D;
          }
          for (int64_t l = first; l < first + step; l++) {
            steps.push_back({&block, image, head, l, target});
          }
        }
      }
      if constexpr (std::is_same_v<T, A>) {
        kernel(p, scratch, steps, p.H * p.D);
      } else {
        const int64_t head = begin % items / groups, l = begin % groups * step;
        const int64_t first = p.levels[l].start, last = l + step < p.L ? p.levels[l + step].start : p.S;
        std::fill(sums.begin() + first * p.D, sums.begin() + last * p.D, A(0));
        kernel(p, scratch, steps, p.D);
        round(sums.data() + first * p.D, image_grad + (first * p.H + head) * p.D, last - first, p.D, p.H * p.D);
      }
      begin = stop;
    }
  });
  return {grad_value, grad_locations.to(sampling_locations.scalar_type()),
          grad_weights.to(attention_weights.scalar_type())};
}

Tensor ms_deform_attn_forward(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights) {
  check(value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  DISPATCH(
      value.scalar_type(),
      forward_typed<T, A>(value, spatial_shapes, level_start_index, sampling_locations, attention_weights));
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights) {
  check(value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  TORCH_CHECK(
      grad_output.device().is_cpu() && grad_output.dim() == 3 && grad_output.size(0) == value.size(0) &&
          grad_output.size(1) == sampling_locations.size(1) &&
          grad_output.size(2) == value.size(2) * value.size(3),
      "ms_deform_attn: the gradient of the output has sizes ", grad_output.sizes());
  DISPATCH(
      value.scalar_type(),
      backward_typed<T, A>(
          grad_output, value, spatial_shapes, level_start_index, sampling_locations, attention_weights));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(codetr_d2, m) {
  m.def(
      "_ms_deform_attn_cpp(Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_locations, "
      "Tensor attention_weights) -> Tensor",
      {});
  m.def(
      "_ms_deform_attn_cpp_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
      "Tensor sampling_locations, Tensor attention_weights) -> (Tensor, Tensor, Tensor)",
      {});
  m.def("_ms_deform_attn_cpp_instruction_set() -> str", instruction_set);
}

TORCH_LIBRARY_IMPL(codetr_d2, CPU, m) {
  m.impl("_ms_deform_attn_cpp", ms_deform_attn_forward);
  m.impl("_ms_deform_attn_cpp_backward", ms_deform_attn_backward);
}
