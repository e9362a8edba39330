// A feed-forward network on the CPU, linear - ReLU - linear, forward and backward.
//
// The hidden features are by far the largest tensors of a transformer layer. PyTorch goes over them for the first layer's
// bias, for its product, and for ReLU; backward to write their gradient, to mask it, and to sum it for the bias. Here
// all of it happens part by part, some rows at a time, while the part is in the cache. Inference never holds them whole,
// and training never their gradient.
//
// The matrix products are PyTorch's: in float32 those of oneDNN, whose kernels take AVX-512 on every processor that has
// it. MKL, which PyTorch takes by itself, has none for AMD's.

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "../instruction_sets.h"

namespace {

using at::Tensor;

constexpr int64_t SUMMED_ROWS = 64;  // of a partial sum, and of a piece of parallel work
constexpr int64_t PART_VALUES = 1 << 22;  // of hidden features; smaller parts make the products slow

int64_t rows_of_part(const Tensor& weight) {
  const int64_t rows = PART_VALUES / std::max<int64_t>(weight.size(0), 1);
  return std::max<int64_t>(rows / SUMMED_ROWS, 1) * SUMMED_ROWS;
}

// ---------------------------------------------------------------- kernels

// values = max(values + bias, 0); NaN stays. Float or double.
template <int VECTOR_BYTES, typename T>
ALWAYS_INLINE void add_bias_relu_row(T* values, const T* bias, int64_t columns) {
  for_channels(columns, [&](auto size, int64_t c) __attribute__((always_inline)) {
    constexpr int C = decltype(size)::value, N = std::min<int>(C, VECTOR_BYTES / sizeof(T));
    for (int i = 0; i < C; i += N) {
      Vector<T, N> v, b;
      load<T, N>(v, values + c + i);
      load<T, N>(b, bias + c + i);
      v += b;
      v = v < 0 ? Vector<T, N>{} : v;
      store<T, N>(values + c + i, v);
    }
  });
}

// values = max(values, 0) of bfloat16, by its bits: below zero is all from -0 to minus infinity; NaN stays.
template <int VECTOR_BYTES>
ALWAYS_INLINE void relu_row(uint16_t* values, int64_t columns) {
  for_channels(columns, [&](auto size, int64_t c) __attribute__((always_inline)) {
    constexpr int C = decltype(size)::value, N = std::min<int>(C, VECTOR_BYTES / 2);
    for (int i = 0; i < C; i += N) {
      Vector<uint16_t, N> v;
      load<uint16_t, N>(v, values + c + i);
      v &= (Vector<uint16_t, N>)(v - uint16_t(0x8000) > uint16_t(0x7F80));
      store<uint16_t, N>(values + c + i, v);
    }
  });
}

// grad = hidden <= 0 ? 0 : grad, and added to sums.
template <int VECTOR_BYTES, typename T>
ALWAYS_INLINE void mask_row(T* grad, T* sums, const T* hidden, int64_t columns) {
  for_channels(columns, [&](auto size, int64_t c) __attribute__((always_inline)) {
    constexpr int C = decltype(size)::value, N = std::min<int>(C, VECTOR_BYTES / sizeof(T));
    for (int i = 0; i < C; i += N) {
      Vector<T, N> g, h, s;
      load<T, N>(g, grad + c + i);
      load<T, N>(h, hidden + c + i);
      load<T, N>(s, sums + c + i);
      g = h <= 0 ? Vector<T, N>{} : g;
      s += g;
      store<T, N>(grad + c + i, g);
      store<T, N>(sums + c + i, s);
    }
  });
}

#define KERNELS(NAME, VECTOR_BYTES, TARGET)                                                                       \
  template <typename T>                                                                                           \
  TARGET void add_bias_relu_##NAME(T* values, const T* bias, int64_t rows, int64_t columns) {                     \
    for (int64_t r = 0; r < rows; r++) {                                                                          \
      add_bias_relu_row<VECTOR_BYTES>(values + r * columns, bias, columns);                                       \
    }                                                                                                             \
  }                                                                                                               \
  template <typename T>                                                                                           \
  TARGET void relu_##NAME(T* values, int64_t rows, int64_t columns) {                                             \
    for (int64_t r = 0; r < rows; r++) {                                                                          \
      relu_row<VECTOR_BYTES>(values + r * columns, columns);                                                      \
    }                                                                                                             \
  }                                                                                                               \
  template <typename T>                                                                                           \
  TARGET void mask_##NAME(T* grad, T* sums, const T* hidden, int64_t rows, int64_t columns) {                     \
    for (int64_t r = 0; r < rows; r++) {                                                                          \
      mask_row<VECTOR_BYTES>(grad + r * columns, sums, hidden + r * columns, columns);                            \
    }                                                                                                             \
  }

FOR_EACH_INSTRUCTION_SET(KERNELS)

// ---------------------------------------------------------------- forward

template <typename Function>
std::optional<c10::TypedOperatorHandle<Function>> find_operator(const char* name) {
  const auto schema = c10::Dispatcher::singleton().findSchema({name, ""});
  return schema ? std::make_optional(schema->typed<Function>()) : std::nullopt;
}

// oneDNN's linear layer in float32, whose weight it lays out once for all parts.
class OneDnnLinear {
 public:
  // Whether PyTorch is built with it, not told to do without it, and has such rows.
  static bool is_for(const Tensor& x, const Tensor& weight) {
    return layer() && layout() && at::hasMKLDNN() && at::globalContext().userEnabledMkldnn() &&
        x.scalar_type() == at::kFloat && x.numel() > 0 && weight.numel() > 0;
  }

  OneDnnLinear(const Tensor& weight, std::optional<Tensor> bias, int64_t rows)
      : weight_(layout()->call(weight.contiguous(), rows)), bias_(std::move(bias)) {}

  Tensor operator()(const Tensor& x) const {
    return layer()->call(x.contiguous(), weight_, bias_, "none", c10::List<std::optional<at::Scalar>>(), "");
  }

 private:
  using Layer = Tensor(
      const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view,
      c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
  using Layout = Tensor(const Tensor&, std::optional<c10::SymInt>);

  static const std::optional<c10::TypedOperatorHandle<Layer>>& layer() {
    static const auto found = find_operator<Layer>("mkldnn::_linear_pointwise");
    return found;
  }
  static const std::optional<c10::TypedOperatorHandle<Layout>>& layout() {
    static const auto found = find_operator<Layout>("mkldnn::_reorder_linear_weight");
    return found;
  }

  Tensor weight_;
  std::optional<Tensor> bias_;
};

// f(first row, one behind the last) for pieces of the rows, in parallel.
template <typename F>
void for_rows(int64_t rows, F f) {
  at::parallel_for(0, rows, SUMMED_ROWS, f);
}

// values = max(values + bias, 0)
template <typename T>
void add_bias_relu(const Tensor& hidden, const Tensor& bias) {
  const auto kernel = CHOOSE_KERNEL(add_bias_relu, T);
  const int64_t columns = hidden.size(1);
  T* const data = hidden.mutable_data_ptr<T>();
  const T* const bias_data = bias.const_data_ptr<T>();
  for_rows(hidden.size(0), [&](int64_t begin, int64_t end) {
    kernel(data + begin * columns, bias_data, end - begin, columns);
  });
}

template <typename T>
void hidden_features(Tensor hidden, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  at::mm_out(hidden, x, weight.t());
  add_bias_relu<T>(hidden, bias);
}

template <>
void hidden_features<at::BFloat16>(Tensor hidden, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  at::addmm_out(hidden, bias, x, weight.t());  // rounds once, with the bias
  const auto kernel = CHOOSE_KERNEL(relu, uint16_t);
  const int64_t columns = hidden.size(1);
  uint16_t* const data = (uint16_t*)hidden.mutable_data_ptr<at::BFloat16>();
  for_rows(hidden.size(0), [&](int64_t begin, int64_t end) { kernel(data + begin * columns, end - begin, columns); });
}

void check(const Tensor& x, const Tensor& weight1, const Tensor& weight2) {
  TORCH_CHECK(x.device().is_cpu(), "feed_forward: expected tensors on the CPU");
  TORCH_CHECK(
      x.dim() == 2 && weight1.dim() == 2 && weight2.dim() == 2 && x.size(1) == weight1.size(1) &&
          weight1.size(0) == weight2.size(1),
      "feed_forward: rows of sizes ", x.sizes(), " do not fit weights of sizes ", weight1.sizes(), " and ",
      weight2.sizes());
  TORCH_CHECK(
      x.scalar_type() == weight1.scalar_type() && x.scalar_type() == weight2.scalar_type(), "feed_forward: rows are ",
      x.scalar_type(), ", the weights ", weight1.scalar_type(), " and ", weight2.scalar_type());
}

// The output, and the hidden features if they are to be kept.
std::tuple<Tensor, Tensor> feed_forward(
    const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2, const Tensor& bias2,
    bool keep_hidden) {
  check(x, weight1, weight2);
  TORCH_CHECK(
      bias1.sizes() == at::IntArrayRef({weight1.size(0)}) && bias1.scalar_type() == x.scalar_type(),
      "feed_forward: the first bias has sizes ", bias1.sizes(), " and is ", bias1.scalar_type());
  const int64_t rows = x.size(0), part = rows_of_part(weight1);
  const Tensor bias = bias1.contiguous();
  Tensor output = at::empty({rows, weight2.size(0)}, x.options());
  Tensor hidden = at::empty({keep_hidden ? rows : 0, weight1.size(0)}, x.options());
  // oneDNN cannot write to a tensor that is there, so what is kept is computed without it.
  if (!keep_hidden && OneDnnLinear::is_for(x, weight1) && OneDnnLinear::is_for(x, weight2)) {
    const OneDnnLinear first(weight1, std::nullopt, part), second(weight2, bias2, part);
    for (int64_t row = 0; row < rows; row += part) {
      const int64_t count = std::min(part, rows - row);
      const Tensor hidden_part = first(x.narrow(0, row, count));
      add_bias_relu<float>(hidden_part, bias);
      output.narrow(0, row, count).copy_(second(hidden_part));
    }
    return {output, at::empty({0}, x.options())};
  }
  for (int64_t row = 0; row < rows; row += part) {
    const int64_t count = std::min(part, rows - row);
    const Tensor x_part = x.narrow(0, row, count);
    if (hidden.size(0) == 0) {
      hidden = at::empty({count, weight1.size(0)}, x.options());
    }
    const Tensor hidden_part = hidden.narrow(0, keep_hidden ? row : 0, count);
    switch (x.scalar_type()) {
      case at::kFloat:
        hidden_features<float>(hidden_part, x_part, weight1, bias);
        break;
      case at::kDouble:
        hidden_features<double>(hidden_part, x_part, weight1, bias);
        break;
      case at::kBFloat16:
        hidden_features<at::BFloat16>(hidden_part, x_part, weight1, bias);
        break;
      default:
        TORCH_CHECK(false, "feed_forward: expected float32, float64 or bfloat16, got ", x.scalar_type());
    }
    Tensor output_part = output.narrow(0, row, count);
    at::addmm_out(output_part, bias2, hidden_part, weight2.t());
  }
  return {output, keep_hidden ? hidden : at::empty({0}, x.options())};
}

// ---------------------------------------------------------------- backward

template <typename T>
void mask(const Tensor& grad, const Tensor& sums, const Tensor& hidden) {
  const auto kernel = CHOOSE_KERNEL(mask, T);
  const int64_t rows = hidden.size(0), columns = hidden.size(1);
  T* const grad_data = grad.mutable_data_ptr<T>();
  T* const sums_data = sums.mutable_data_ptr<T>();
  const T* const hidden_data = hidden.const_data_ptr<T>();
  at::parallel_for(0, sums.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = i * SUMMED_ROWS, at = row * columns;
      kernel(grad_data + at, sums_data + i * columns, hidden_data + at, std::min(SUMMED_ROWS, rows - row), columns);
    }
  });
}

// The gradients of x, weight1, bias1 and weight2; those that are not needed may be zero.
std::tuple<Tensor, Tensor, Tensor, Tensor> feed_forward_backward(
    const Tensor& grad, const Tensor& x, const Tensor& hidden, const Tensor& weight1, const Tensor& weight2,
    bool needs_x, bool needs_weights) {
  check(x, weight1, weight2);
  const int64_t rows = x.size(0), columns = weight1.size(0), part = rows_of_part(weight1);
  TORCH_CHECK(
      grad.sizes() == at::IntArrayRef({rows, weight2.size(0)}) && hidden.sizes() == at::IntArrayRef({rows, columns}) &&
          hidden.is_contiguous(),
      "feed_forward: the gradient of the output has sizes ", grad.sizes(), ", the hidden features ", hidden.sizes());
  TORCH_CHECK(
      grad.scalar_type() == x.scalar_type() && hidden.scalar_type() == x.scalar_type() &&
          (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble),
      "feed_forward: expected gradients in float32 or float64, got ", grad.scalar_type());
  Tensor grad_x = needs_x ? at::empty(x.sizes(), x.options()) : at::zeros(x.sizes(), x.options());
  Tensor grad_weight1 = at::zeros(weight1.sizes(), x.options());
  Tensor grad_weight2 = at::zeros(weight2.sizes(), x.options());
  Tensor sums = at::zeros({(rows + SUMMED_ROWS - 1) / SUMMED_ROWS, columns}, x.options());
  Tensor grad_hidden = at::empty({std::min(rows, part), columns}, x.options());
  for (int64_t row = 0; row < rows; row += part) {
    const int64_t count = std::min(part, rows - row);
    const Tensor grad_part = grad.narrow(0, row, count), hidden_part = hidden.narrow(0, row, count);
    const Tensor sums_part = sums.narrow(0, row / SUMMED_ROWS, (count + SUMMED_ROWS - 1) / SUMMED_ROWS);
    Tensor grad_hidden_part = grad_hidden.narrow(0, 0, count);
    at::mm_out(grad_hidden_part, grad_part, weight2);
    if (x.scalar_type() == at::kFloat) {
      mask<float>(grad_hidden_part, sums_part, hidden_part);
    } else {
      mask<double>(grad_hidden_part, sums_part, hidden_part);
    }
    if (needs_x) {
      Tensor grad_x_part = grad_x.narrow(0, row, count);
      at::mm_out(grad_x_part, grad_hidden_part, weight1);
    }
    if (needs_weights) {
      grad_weight1.addmm_(grad_hidden_part.t(), x.narrow(0, row, count));
      grad_weight2.addmm_(grad_part.t(), hidden_part);
    }
  }
  return {grad_x, grad_weight1, sums.sum(0), grad_weight2};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(codetr_d2, m) {
  m.def(
      "_feed_forward_cpp(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, bool keep_hidden) -> "
      "(Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_feed_forward_cpp_backward(Tensor grad, Tensor x, Tensor hidden, Tensor weight1, Tensor weight2, bool needs_x, "
      "bool needs_weights) -> (Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(codetr_d2, CPU, m) {
  m.impl("_feed_forward_cpp", feed_forward);
  m.impl("_feed_forward_cpp_backward", feed_forward_backward);
}
