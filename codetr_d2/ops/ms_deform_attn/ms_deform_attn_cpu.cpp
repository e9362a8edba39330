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
//
// Files: vectors.h, problem.h (the types), windows.h (windows and points), forward.h, backward.h (the passes), kernels.h
// (one function for each instruction set), blocks.h (how the work is cut). Here: checks, threads, the operators.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "blocks.h"
#include "kernels.h"

namespace {

using at::Tensor;

// The levels of flat shapes (height, width, height, width, ...), which follow each other.
std::vector<Level> levels_of(at::IntArrayRef shapes) {
  std::vector<Level> levels;
  int64_t start = 0;
  for (size_t i = 0; i + 1 < shapes.size(); i += 2) {
    levels.push_back({(int32_t)shapes[i], (int32_t)shapes[i + 1], start});
    start += shapes[i] * shapes[i + 1];
  }
  return levels;
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
      const Tensor& value_, at::IntArrayRef shapes, const Tensor& locations_, const Tensor& weights_,
      int64_t num_windows)
      : levels(levels_of(shapes)) {
    const auto type = c10::CppTypeToScalarType<A>::value;
    value = value_.contiguous();
    locations = locations_.to(type).contiguous();
    weights = weights_.to(type).contiguous();
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
    const Tensor& value, at::IntArrayRef shapes, const Tensor& sampling_locations, const Tensor& attention_weights) {
  for (const Tensor& tensor : {value, sampling_locations, attention_weights}) {
    TORCH_CHECK(tensor.device().is_cpu(), "ms_deform_attn: a tensor is on ", tensor.device(), ", expected the CPU");
  }
  TORCH_CHECK(value.dim() == 4, "ms_deform_attn: value must be [B, S, heads, D], got ", value.sizes());
  TORCH_CHECK(
      shapes.size() % 2 == 0, "ms_deform_attn: spatial_shapes must be a height and a width for each level, got ", shapes);
  const int64_t num_levels = shapes.size() / 2;
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
    const int64_t height = shapes[2 * l], width = shapes[2 * l + 1];
    TORCH_CHECK(height >= 0 && width >= 0, "ms_deform_attn: level ", l, " has a negative size");
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
    const Tensor& value, at::IntArrayRef shapes, const Tensor& sampling_locations,
    const Tensor& attention_weights) {
  Prepared<T, A> prepared(
      value, shapes, sampling_locations, attention_weights, 2);
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
    const Tensor& grad_output, const Tensor& value, at::IntArrayRef shapes, const Tensor& sampling_locations,
    const Tensor& attention_weights) {
  Prepared<T, A> prepared(
      value, shapes, sampling_locations, attention_weights, 4);
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
    const Tensor& value, at::IntArrayRef shapes, const Tensor& sampling_locations,
    const Tensor& attention_weights) {
  check(value, shapes, sampling_locations, attention_weights);
  DISPATCH(
      value.scalar_type(),
      forward_typed<T, A>(value, shapes, sampling_locations, attention_weights));
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(
    const Tensor& grad_output, const Tensor& value, at::IntArrayRef shapes, const Tensor& sampling_locations,
    const Tensor& attention_weights) {
  check(value, shapes, sampling_locations, attention_weights);
  TORCH_CHECK(
      grad_output.device().is_cpu() && grad_output.dim() == 3 && grad_output.size(0) == value.size(0) &&
          grad_output.size(1) == sampling_locations.size(1) &&
          grad_output.size(2) == value.size(2) * value.size(3),
      "ms_deform_attn: the gradient of the output has sizes ", grad_output.sizes());
  DISPATCH(
      value.scalar_type(),
      backward_typed<T, A>(
          grad_output, value, shapes, sampling_locations, attention_weights));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(codetr_d2, m) {
  m.def(
      "_ms_deform_attn_cpp(Tensor value, int[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights) "
      "-> Tensor",
      {});
  m.def(
      "_ms_deform_attn_cpp_backward(Tensor grad_output, Tensor value, int[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights) -> (Tensor, Tensor, Tensor)",
      {});
  m.def("_ms_deform_attn_cpp_instruction_set() -> str", instruction_set);
}

TORCH_LIBRARY_IMPL(codetr_d2, CPU, m) {
  m.impl("_ms_deform_attn_cpp", ms_deform_attn_forward);
  m.impl("_ms_deform_attn_cpp_backward", ms_deform_attn_backward);
}
