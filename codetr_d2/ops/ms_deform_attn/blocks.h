// Cutting the queries into blocks, each with the part of the maps that it most likely samples.

#pragma once

#include <cmath>

#include "problem.h"

namespace {

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

}  // namespace
