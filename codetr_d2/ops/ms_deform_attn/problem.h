// What is computed: levels, queries, windows, and the steps that the work is cut into.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "vectors.h"

namespace {

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

}  // namespace
