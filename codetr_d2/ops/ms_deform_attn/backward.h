// Backward: gradients of the taps, the locations and the weights.

#pragma once

#include "windows.h"

namespace {

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

}  // namespace
