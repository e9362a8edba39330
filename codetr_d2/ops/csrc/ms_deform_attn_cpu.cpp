// Multi-scale deformable attention on the CPU, forward and backward.
//
// Every sampling point reads four taps, the neighbouring cells of its location, each of them D contiguous channels. The
// kernels first turn all points of one query and head into flat lists of tap offsets and weights (a loop that
// vectorises over points), then run over the taps with the accumulators in vector registers (vectorised over channels).
// A tap outside its map points to a row of zeros, so that the inner loops have no branch and never read what they must
// not.
//
// The kernels are templates on the vector size, forced inline into one function for each instruction set; which
// of them runs is decided when called. Nothing is compiled for the building machine alone.

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#if !defined(__GNUC__)
#error "this file needs the vector extensions of GCC or Clang"
#endif
#if defined(__x86_64__)
#define CODETR_X86 1
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace {

using at::Tensor;

// ---------------------------------------------------------------- vectors

// N numbers of type A, without any demand on alignment: they are loaded and stored with memcpy.
template <typename A, int N>
struct VectorOf {
  typedef A type __attribute__((vector_size(N * sizeof(A))));
};
template <typename A, int N>
using Vector = typename VectorOf<A, N>::type;

template <typename A, int N>
ALWAYS_INLINE void load(Vector<A, N>& v, const A* p) {
  __builtin_memcpy(&v, p, sizeof(v));
}

// bfloat16 is the upper half of a float32.
template <typename A, int N>
ALWAYS_INLINE void load(Vector<A, N>& v, const c10::BFloat16* p) {
  Vector<uint16_t, N> halves;
  __builtin_memcpy(&halves, p, sizeof(halves));
  v = (Vector<A, N>)(__builtin_convertvector(halves, Vector<uint32_t, N>) << 16);
}

template <typename A, int N>
ALWAYS_INLINE void store(A* p, const Vector<A, N>& v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <typename A, int N>
ALWAYS_INLINE void store(c10::BFloat16* p, const Vector<A, N>& v) {
  for (int i = 0; i < N; i++) {
    p[i] = c10::BFloat16(v[i]);
  }
}

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

// ---------------------------------------------------------------- the problem

// value [B, S, H, D], locations [B, Q, H, n, 2] and weights [B, Q, H, n] with n = L * P points, output [B, Q, H, D].
template <typename T, typename A>
struct Problem {
  int64_t B, S, H, D, Q, n;
  const T* value;
  const A* locations;
  const A* weights;
  // The level of every point: width and height (as numbers of both types) and the first token.
  const A *width, *height;
  const int32_t *width_i, *height_i, *start;
  const T* zeros;  // [D]
  T* output;

  // Backward only. A work item is one image, head and one of `groups` runs of levels, whose tokens no other item
  // touches.
  const T* grad_output;
  T* grad_value;
  A* grad_locations;
  A* grad_weights;
  int64_t groups;
};

// The taps of up to n points: tap k of point i stands at [k * n + i], k = 0..3 being (y, x), (y, x+1), (y+1, x),
// (y+1, x+1).
template <typename A>
struct Taps {
  explicit Taps(int64_t n)
      : offset(4 * n), grad_offset(4 * n), token(4 * n), weight(4 * n), dot(4 * n), x(n), y(n) {}
  std::vector<int64_t> offset;       // in bytes, from the first channel of the image's first token and the head
  std::vector<int64_t> grad_offset;  // the same in the gradient of the value
  std::vector<int32_t> token;        // -1 outside
  std::vector<A> weight;             // bilinear weight times attention weight
  std::vector<A> dot;                // <value of the tap, gradient of the output>
  std::vector<A> x, y;               // position inside the cell, 0..1
};

// Fill token, weight, x and y of `taps` from n points that begin with point `first` of query and head `row`.
template <typename T, typename A>
ALWAYS_INLINE void make_taps(const Problem<T, A>& p, int64_t row, int64_t first, int64_t n, Taps<A>& taps) {
  const A* __restrict location = p.locations + (row * p.n + first) * 2;
  const A* __restrict attention = p.weights + row * p.n + first;
  const A* __restrict width = p.width + first;
  const A* __restrict height = p.height + first;
  const int32_t* __restrict width_i = p.width_i + first;
  const int32_t* __restrict height_i = p.height_i + first;
  const int32_t* __restrict start = p.start + first;
  int32_t* __restrict token = taps.token.data();
  A* __restrict weight = taps.weight.data();
  A* __restrict cell_x = taps.x.data();
  A* __restrict cell_y = taps.y.data();
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    A x = location[2 * i] * width[i] - A(0.5);
    A y = location[2 * i + 1] * height[i] - A(0.5);
    // To just outside the map what lies further outside, is infinite or (all comparisons false) not a number.
    x = x > A(-2) ? x : A(-2);
    y = y > A(-2) ? y : A(-2);
    x = x < width[i] + A(1) ? x : width[i] + A(1);
    y = y < height[i] + A(1) ? y : height[i] + A(1);
    int32_t x0 = (int32_t)x, y0 = (int32_t)y;  // rounds towards zero
    x0 -= x < (A)x0;
    y0 -= y < (A)y0;
    const A right = x - (A)x0, lower = y - (A)y0;
    // 0 inside, -1 outside.
    const int32_t out_x0 = -(int32_t)((uint32_t)x0 >= (uint32_t)width_i[i]);
    const int32_t out_x1 = -(int32_t)((uint32_t)(x0 + 1) >= (uint32_t)width_i[i]);
    const int32_t out_y0 = -(int32_t)((uint32_t)y0 >= (uint32_t)height_i[i]);
    const int32_t out_y1 = -(int32_t)((uint32_t)(y0 + 1) >= (uint32_t)height_i[i]);
    const int32_t t = start[i] + y0 * width_i[i] + x0;
    token[i] = t | out_y0 | out_x0;
    token[n + i] = (t + 1) | out_y0 | out_x1;
    token[2 * n + i] = (t + width_i[i]) | out_y1 | out_x0;
    token[3 * n + i] = (t + width_i[i] + 1) | out_y1 | out_x1;
    const A above = attention[i] * (A(1) - lower), below = attention[i] * lower;
    weight[i] = above * (A(1) - right);
    weight[n + i] = above * right;
    weight[2 * n + i] = below * (A(1) - right);
    weight[3 * n + i] = below * right;
    cell_x[i] = right;
    cell_y[i] = lower;
  }
}

// Byte offsets of n tokens that are `stride` bytes apart; those outside get `outside`.
ALWAYS_INLINE void make_offsets(
    const int32_t* __restrict token, int64_t n, int64_t stride, int64_t outside, int64_t* __restrict offset) {
  for (int64_t i = 0; i < n; i++) {
    offset[i] = token[i] < 0 ? outside : (int64_t)token[i] * stride;
  }
}

// ---------------------------------------------------------------- forward

// output[0..C) = sum over the taps of weight * value[0..C)
template <int C, int VECTOR_BYTES, typename T, typename A>
ALWAYS_INLINE void gather(
    const char* base, const int64_t* __restrict offset, const A* __restrict weight, int64_t num_taps, T* output) {
  constexpr int N = std::min<int>(C, VECTOR_BYTES / sizeof(A));
  constexpr int M = C / N;
  // Two sets of accumulators: one alone would wait for its own last addition.
  Vector<A, N> even[M] = {}, odd[M] = {};
  for (int64_t i = 0; i < num_taps; i += 2) {
    const T* first = (const T*)(base + offset[i]);
    const T* second = (const T*)(base + offset[i + 1]);
    const A first_weight = weight[i], second_weight = weight[i + 1];
    for (int j = 0; j < M; j++) {
      Vector<A, N> v, w;
      load<A, N>(v, first + j * N);
      load<A, N>(w, second + j * N);
      even[j] += v * first_weight;
      odd[j] += w * second_weight;
    }
  }
  for (int j = 0; j < M; j++) {
    store<A, N>(output + j * N, even[j] + odd[j]);
  }
}

template <int VECTOR_BYTES, typename T, typename A>
ALWAYS_INLINE void forward_rows(const Problem<T, A>& p, Taps<A>& taps, int64_t begin, int64_t end) {
  const int64_t stride = p.H * p.D * sizeof(T);
  const int64_t* offset = taps.offset.data();
  const A* weight = taps.weight.data();
  const int64_t num_taps = 4 * p.n;
  for (int64_t query = begin; query < end; query++) {
    for (int64_t head = 0; head < p.H; head++) {
      const int64_t row = query * p.H + head;
      const char* base = (const char*)(p.value + (query / p.Q * p.S * p.H + head) * p.D);
      make_taps(p, row, 0, p.n, taps);
      make_offsets(taps.token.data(), num_taps, stride, (const char*)p.zeros - base, taps.offset.data());
      T* output = p.output + row * p.D;
      int64_t c = 0;
      for (; c + 64 <= p.D; c += 64) {
        gather<64, VECTOR_BYTES>(base + c * sizeof(T), offset, weight, num_taps, output + c);
      }
      for (; c + 32 <= p.D; c += 32) {
        gather<32, VECTOR_BYTES>(base + c * sizeof(T), offset, weight, num_taps, output + c);
      }
      for (; c + 8 <= p.D; c += 8) {
        gather<8, VECTOR_BYTES>(base + c * sizeof(T), offset, weight, num_taps, output + c);
      }
      for (; c < p.D; c++) {
        gather<1, VECTOR_BYTES>(base + c * sizeof(T), offset, weight, num_taps, output + c);
      }
    }
  }
}

// ---------------------------------------------------------------- backward

// For every tap: grad_value[0..C) += weight * grad_output[0..C), and dot += <value[0..C), grad_output[0..C)>.
template <int C, int VECTOR_BYTES, typename T, typename A>
ALWAYS_INLINE void scatter(const char* base, char* grad_base, int64_t n, const T* grad_output, Taps<A>& taps) {
  constexpr int N = std::min<int>(C, VECTOR_BYTES / sizeof(A));
  constexpr int M = C / N;
  const int64_t* __restrict offset = taps.offset.data();
  const int64_t* __restrict grad_offset = taps.grad_offset.data();
  const A* __restrict weight = taps.weight.data();
  A* __restrict dot = taps.dot.data();
  Vector<A, N> grad[M];
  for (int j = 0; j < M; j++) {
    load<A, N>(grad[j], grad_output + j * N);
  }
  for (int64_t i = 0; i < 4 * n; i++) {
    const T* v = (const T*)(base + offset[i]);
    A* g = (A*)(grad_base + grad_offset[i]);
    const A w = weight[i];
    Vector<A, N> partial = {};
    for (int j = 0; j < M; j++) {
      Vector<A, N> value, grad_value;
      load<A, N>(value, v + j * N);
      partial += value * grad[j];
      load<A, N>(grad_value, g + j * N);
      grad_value += grad[j] * w;
      store<A, N>(g + j * N, grad_value);
    }
    dot[i] += sum<A, N>(partial);
  }
}

// Work items [begin, end) of one image. `grad_value` points to the gradient of the image's first token and head 0,
// where tokens are `grad_stride` numbers apart and heads `grad_head_stride`; `dump` is a row that nobody reads.
template <int VECTOR_BYTES, typename T, typename A>
ALWAYS_INLINE void backward_items(
    const Problem<T, A>& p, Taps<A>& taps, int64_t image, int64_t begin, int64_t end, A* grad_value,
    int64_t grad_stride, int64_t grad_head_stride, A* dump) {
  const int64_t n = p.n / p.groups;
  const int64_t stride = p.H * p.D * sizeof(T);
  const A* __restrict dot = taps.dot.data();
  const A* __restrict x = taps.x.data();
  const A* __restrict y = taps.y.data();
  for (int64_t query = image * p.Q; query < (image + 1) * p.Q; query++) {
    for (int64_t item = begin; item < end; item++) {
      const int64_t head = item / p.groups, first = item % p.groups * n;
      const int64_t row = query * p.H + head;
      const char* base = (const char*)(p.value + (image * p.S * p.H + head) * p.D);
      char* grad_base = (char*)(grad_value + head * grad_head_stride);
      make_taps(p, row, first, n, taps);
      make_offsets(taps.token.data(), 4 * n, stride, (const char*)p.zeros - base, taps.offset.data());
      make_offsets(
          taps.token.data(), 4 * n, grad_stride * sizeof(A), (char*)dump - grad_base, taps.grad_offset.data());
      std::memset(taps.dot.data(), 0, 4 * n * sizeof(A));
      const T* grad_output = p.grad_output + row * p.D;
      int64_t c = 0;
      for (; c + 64 <= p.D; c += 64) {
        scatter<64, VECTOR_BYTES>(base + c * sizeof(T), grad_base + c * sizeof(A), n, grad_output + c, taps);
      }
      for (; c + 32 <= p.D; c += 32) {
        scatter<32, VECTOR_BYTES>(base + c * sizeof(T), grad_base + c * sizeof(A), n, grad_output + c, taps);
      }
      for (; c + 8 <= p.D; c += 8) {
        scatter<8, VECTOR_BYTES>(base + c * sizeof(T), grad_base + c * sizeof(A), n, grad_output + c, taps);
      }
      for (; c < p.D; c++) {
        scatter<1, VECTOR_BYTES>(base + c * sizeof(T), grad_base + c * sizeof(A), n, grad_output + c, taps);
      }
      const A* __restrict attention = p.weights + row * p.n + first;
      const A* __restrict width = p.width + first;
      const A* __restrict height = p.height + first;
      A* __restrict grad_attention = p.grad_weights + row * p.n + first;
      A* __restrict grad_location = p.grad_locations + (row * p.n + first) * 2;
      for (int64_t i = 0; i < n; i++) {
        const A d00 = dot[i], d01 = dot[n + i], d10 = dot[2 * n + i], d11 = dot[3 * n + i];
        const A along_x = (A(1) - y[i]) * (d01 - d00) + y[i] * (d11 - d10);
        const A along_y = (A(1) - x[i]) * (d10 - d00) + x[i] * (d11 - d01);
        const A upper = (A(1) - x[i]) * d00 + x[i] * d01, lower = (A(1) - x[i]) * d10 + x[i] * d11;
        grad_attention[i] = (A(1) - y[i]) * upper + y[i] * lower;
        grad_location[2 * i] = attention[i] * width[i] * along_x;
        grad_location[2 * i + 1] = attention[i] * height[i] * along_y;
      }
    }
  }
}

// ---------------------------------------------------------------- one function for each instruction set

template <typename T, typename A>
using Forward = void (*)(const Problem<T, A>&, Taps<A>&, int64_t, int64_t);
template <typename T, typename A>
using Backward = void (*)(const Problem<T, A>&, Taps<A>&, int64_t, int64_t, int64_t, A*, int64_t, int64_t, A*);

#define KERNELS(NAME, VECTOR_BYTES, TARGET)                                                                          \
  template <typename T, typename A>                                                                                  \
  TARGET void forward_##NAME(const Problem<T, A>& p, Taps<A>& taps, int64_t begin, int64_t end) {                    \
    forward_rows<VECTOR_BYTES>(p, taps, begin, end);                                                                 \
  }                                                                                                                  \
  template <typename T, typename A>                                                                                  \
  TARGET void backward_##NAME(                                                                                       \
      const Problem<T, A>& p, Taps<A>& taps, int64_t image, int64_t begin, int64_t end, A* grad_value,               \
      int64_t grad_stride, int64_t grad_head_stride, A* dump) {                                                      \
    backward_items<VECTOR_BYTES>(p, taps, image, begin, end, grad_value, grad_stride, grad_head_stride, dump);       \
  }

KERNELS(baseline, 16, )
#ifdef CODETR_X86
KERNELS(avx2, 32, __attribute__((target("avx2,fma"))))
KERNELS(avx512, 64, __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))))
#endif

// "AVX512", "AVX2" or else. PyTorch's own choice, so that ATEN_CPU_CAPABILITY holds here too.
std::string instruction_set() {
#ifdef CODETR_X86
  static const std::string name = at::get_cpu_capability();
  if (name == "AVX512" || name == "AVX2") {
    return name;
  }
#endif
  return "baseline";
}

template <typename T, typename A>
std::pair<Forward<T, A>, Backward<T, A>> kernels() {
#ifdef CODETR_X86
  const std::string name = instruction_set();
  if (name == "AVX512") {
    return {forward_avx512<T, A>, backward_avx512<T, A>};
  }
  if (name == "AVX2") {
    return {forward_avx2<T, A>, backward_avx2<T, A>};
  }
#endif
  return {forward_baseline<T, A>, backward_baseline<T, A>};
}

// ---------------------------------------------------------------- checks and set-up

// Owns what a Problem points to, beside the tensors.
template <typename T, typename A>
struct Prepared {
  Tensor value, locations, weights;
  std::vector<A> width, height;
  std::vector<int32_t> width_i, height_i, start;
  std::vector<T> zeros;
  Problem<T, A> problem{};

  Prepared(
      const Tensor& value_, const Tensor& shapes, const Tensor& starts, const Tensor& locations_,
      const Tensor& weights_) {
    const auto type = c10::CppTypeToScalarType<A>::value;
    value = value_.contiguous();
    locations = locations_.to(type).contiguous();
    weights = weights_.to(type).contiguous();
    const Tensor hw = shapes.contiguous(), first = starts.contiguous();
    const int64_t num_levels = hw.size(0), num_points = locations.size(4);
    for (int64_t l = 0; l < num_levels; l++) {
      for (int64_t i = 0; i < num_points; i++) {
        height_i.push_back((int32_t)hw.const_data_ptr<int64_t>()[2 * l]);
        width_i.push_back((int32_t)hw.const_data_ptr<int64_t>()[2 * l + 1]);
        start.push_back((int32_t)first.const_data_ptr<int64_t>()[l]);
      }
    }
    height.assign(height_i.begin(), height_i.end());
    width.assign(width_i.begin(), width_i.end());
    zeros.assign(value.size(3), T(0));
    problem.B = value.size(0);
    problem.S = value.size(1);
    problem.H = value.size(2);
    problem.D = value.size(3);
    problem.Q = locations.size(1);
    problem.n = num_levels * num_points;
    problem.value = value.const_data_ptr<T>();
    problem.locations = locations.template const_data_ptr<A>();
    problem.weights = weights.template const_data_ptr<A>();
    problem.width = width.data();
    problem.height = height.data();
    problem.width_i = width_i.data();
    problem.height_i = height_i.data();
    problem.start = start.data();
    problem.zeros = zeros.data();
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
  Prepared<T, A> prepared(value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  Problem<T, A>& p = prepared.problem;
  Tensor output = at::empty({p.B, p.Q, p.H * p.D}, value.options().memory_format(at::MemoryFormat::Contiguous));
  p.output = output.template mutable_data_ptr<T>();
  const auto kernel = kernels<T, A>().first;
  at::parallel_for(0, p.B * p.Q, 16, [&](int64_t begin, int64_t end) {
    Taps<A> taps(p.n);
    kernel(p, taps, begin, end);
  });
  return output;
}

template <typename T, typename A>
std::tuple<Tensor, Tensor, Tensor> backward_typed(
    const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights) {
  Prepared<T, A> prepared(value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  Problem<T, A>& p = prepared.problem;
  const Tensor grad = grad_output.to(value.scalar_type()).contiguous();
  p.grad_output = grad.template const_data_ptr<T>();
  Tensor grad_value = at::zeros_like(prepared.value);
  Tensor grad_locations = at::empty_like(prepared.locations), grad_weights = at::empty_like(prepared.weights);
  p.grad_value = grad_value.template mutable_data_ptr<T>();
  p.grad_locations = grad_locations.template mutable_data_ptr<A>();
  p.grad_weights = grad_weights.template mutable_data_ptr<A>();
  // Heads never share a gradient, nor do levels: split by level too where the heads don't share out evenly.
  const int64_t num_levels = spatial_shapes.size(0);
  p.groups = p.B * p.H % at::get_num_threads() == 0 ? 1 : std::max<int64_t>(num_levels, 1);
  const int64_t items = p.H * p.groups;
  const auto kernel = kernels<T, A>().second;
  at::parallel_for(0, p.B * items, 1, [&](int64_t begin, int64_t end) {
    Taps<A> taps(p.n);
    std::vector<A> dump(p.D);
    while (begin < end) {
      const int64_t image = begin / items;
      if constexpr (std::is_same_v<T, A>) {
        // All heads of a query in turn: their taps are neighbours in memory.
        const int64_t stop = std::min(end, (image + 1) * items);
        kernel(
            p, taps, image, begin - image * items, stop - image * items, p.grad_value + image * p.S * p.H * p.D,
            p.H * p.D, p.D, dump.data());
        begin = stop;
      } else {
        // One at a time, into sums of full precision.
        const int64_t item = begin - image * items, head = item / p.groups;
        std::vector<A> sums(p.S * p.D);
        kernel(p, taps, image, item, item + 1, sums.data(), p.D, 0, dump.data());
        T* target = p.grad_value + (image * p.S * p.H + head) * p.D;
        const int64_t n = p.n / p.groups, group = item % p.groups;
        const int64_t first = p.groups == 1 ? 0 : p.start[group * n];
        const int64_t last = p.groups == 1 || group + 1 == p.groups ? p.S : p.start[(group + 1) * n];
        for (int64_t token = first; token < last; token++) {
          for (int64_t c = 0; c < p.D; c++) {
            target[token * p.H * p.D + c] = T(sums[token * p.D + c]);
          }
        }
        begin++;
      }
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
