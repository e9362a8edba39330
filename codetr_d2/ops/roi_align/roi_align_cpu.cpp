// ROIAlign on the CPU, forward and backward. Source: Mask R-CNN (He et al., ICCV 2017), section 3.
//
// A bin is the mean of bilinear samples on a grid, so it is separable: for each ROI and channel, output = Y map X^T,
// where the sparse matrices Y [bins, height] and X [bins, width] hold the bilinear weights of the samples, the rules at
// the borders and the divisor. They are made once for each ROI and serve all its channels. The forward pass reduces a
// row of the map over x, then adds it to the bins that it touches; the backward pass is the transpose.
//
// Maps are read where they lie, channels last, and vectors run over the channels. The output has PyTorch's usual layout,
// which is what the layers that follow read. The forward pass is parallel over ROIs. In the backward pass, where ROIs
// overlap, each thread has channels of its own for all ROIs, so sums always have the same order.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../instruction_sets.h"

namespace {

using at::Tensor;

// ---------------------------------------------------------------- the sparse matrices of a ROI

// What `cell`, a row or column of the map, counts in a row or column of bins.
template <typename T>
struct Tap {
  int64_t bin, cell;
  T weight;
};
template <typename T>
using Taps = std::vector<Tap<T>>;

template <typename T>
void sort_by_cell(Taps<T>& taps) {
  std::stable_sort(taps.begin(), taps.end(), [](const Tap<T>& a, const Tap<T>& b) { return a.cell < b.cell; });
}

// The taps of a ROI along one axis, sorted by bin. None at all if the ROI is not finite or holds no sample.
template <typename T>
void find_taps(Taps<T>& taps, T start, T size, int64_t bins, int64_t sampling_ratio, int64_t cells) {
  taps.clear();
  const T bin_size = size / bins, samples = sampling_ratio > 0 ? T(sampling_ratio) : std::ceil(bin_size);
  if (!std::isfinite(start) || !std::isfinite(size) || !(samples > 0) || cells == 0) {
    return;
  }
  for (int64_t bin = 0; bin < bins; bin++) {
    const T begin = start + bin * bin_size;
    double first = 0, count = samples;
    if (sampling_ratio <= 0) {
      // A ROI may be far larger than the map. Its samples are half a cell apart at least, or a bin has just one.
      const double step = double(bin_size) / samples;
      first = std::clamp(std::floor((-1 - double(begin)) / step) - 2, 0.0, count);
      count = std::clamp(std::ceil((cells - double(begin)) / step) + 2, first, count) - first;
      count = std::min(count, 2.0 * cells + 16);
    }
    const int64_t bin_taps = taps.size();
    const auto add = [&](int64_t cell, T weight) {  // to the tap of the cell, if one of the last two is
      for (int64_t i = taps.size(); i-- > std::max<int64_t>(bin_taps, int64_t(taps.size()) - 2);) {
        if (taps[i].cell == cell) {
          taps[i].weight += weight;
          return;
        }
      }
      taps.push_back({bin, cell, weight});
    };
    for (int64_t i = 0; i < int64_t(count); i++) {
      T place = begin + (T(first + i) + T(0.5)) * bin_size / samples;
      if (!(place >= -1 && place <= cells)) {
        continue;
      }
      place = std::clamp(place, T(0), T(cells - 1));
      const int64_t cell = place;
      const T fraction = place - cell;
      add(cell, (1 - fraction) / samples);
      if (fraction > 0) {
        add(cell + 1, fraction / samples);
      }
    }
  }
}

// ---------------------------------------------------------------- kernels

// Channels of an image: cell (y, x) begins at data + y * row + x * column. The bins of a ROI's channels follow each
// other: [channels, height, width].
template <typename T>
struct Map {
  T* data;
  int64_t row, column, channels;
};
struct Bins {
  int64_t height, width;
};

constexpr int64_t MAX_BLOCK = 64;  // channels at a time

template <typename T>
int64_t scratch_size(const Bins& bins) {
  return (bins.height + 1) * bins.width * MAX_BLOCK;
}

// target[i] += weight * source[i], of some blocks of C channels.
template <int VECTOR_BYTES, int C, typename T>
ALWAYS_INLINE void add_scaled(T* target, const T* source, T weight, int64_t blocks) {
  constexpr int N = std::min<int>(C, VECTOR_BYTES / sizeof(T));
  for (int64_t i = 0; i < blocks * C; i += N) {
    Vector<T, N> v, w;
    load<T, N>(v, target + i);
    load<T, N>(w, source + i);
    v += weight * w;
    store<T, N>(target + i, v);
  }
}

// `rows` sorted by cell, `columns` by bin.
template <int VECTOR_BYTES, typename T>
ALWAYS_INLINE void forward_roi(
    const Map<const T>& map, const Taps<T>& rows, const Taps<T>& columns, const Bins& bins, T* output, T* scratch) {
  const int64_t num_bins = bins.height * bins.width;
  for_channels(map.channels, [&](auto size, int64_t c) __attribute__((always_inline)) {
    constexpr int C = decltype(size)::value, N = std::min<int>(C, VECTOR_BYTES / sizeof(T)), M = C / N;
    T* const sums = scratch;                 // [bins.height, bins.width, C]
    T* const line = scratch + num_bins * C;  // [bins.width, C]
    std::fill(sums, line, T(0));
    for (auto row = rows.begin(); row != rows.end();) {
      const int64_t y = row->cell;
      const T* source = map.data + y * map.row + c;
      auto tap = columns.begin();
      for (int64_t bin = 0; bin < bins.width; bin++) {
        Vector<T, N> sum[M] = {};
        for (; tap != columns.end() && tap->bin == bin; tap++) {
          for (int j = 0; j < M; j++) {
            Vector<T, N> v;
            load<T, N>(v, source + tap->cell * map.column + j * N);
            sum[j] += tap->weight * v;
          }
        }
        for (int j = 0; j < M; j++) {
          store<T, N>(line + bin * C + j * N, sum[j]);
        }
      }
      for (; row != rows.end() && row->cell == y; row++) {
        add_scaled<VECTOR_BYTES, C>(sums + row->bin * bins.width * C, line, row->weight, bins.width);
      }
    }
    for (int64_t k = 0; k < C; k++) {
      for (int64_t bin = 0; bin < num_bins; bin++) {
        output[(c + k) * num_bins + bin] = sums[bin * C + k];
      }
    }
  });
}

// `rows` and `columns` sorted by cell. Adds to the map, the gradient of the features.
template <int VECTOR_BYTES, typename T>
ALWAYS_INLINE void backward_roi(
    const Map<T>& map, const Taps<T>& rows, const Taps<T>& columns, const Bins& bins, const T* grad, T* scratch) {
  const int64_t num_bins = bins.height * bins.width;
  for_channels(map.channels, [&](auto size, int64_t c) __attribute__((always_inline)) {
    constexpr int C = decltype(size)::value, N = std::min<int>(C, VECTOR_BYTES / sizeof(T)), M = C / N;
    T* const grads = scratch;                 // [bins.height, bins.width, C]
    T* const line = scratch + num_bins * C;  // [bins.width, C]
    for (int64_t k = 0; k < C; k++) {
      for (int64_t bin = 0; bin < num_bins; bin++) {
        grads[bin * C + k] = grad[(c + k) * num_bins + bin];
      }
    }
    for (auto row = rows.begin(); row != rows.end();) {
      const int64_t y = row->cell;
      std::fill(line, line + bins.width * C, T(0));
      for (; row != rows.end() && row->cell == y; row++) {
        add_scaled<VECTOR_BYTES, C>(line, grads + row->bin * bins.width * C, row->weight, bins.width);
      }
      for (auto tap = columns.begin(); tap != columns.end();) {
        const int64_t x = tap->cell;
        T* target = map.data + y * map.row + x * map.column + c;
        Vector<T, N> sum[M];
        for (int j = 0; j < M; j++) {
          load<T, N>(sum[j], target + j * N);
        }
        for (; tap != columns.end() && tap->cell == x; tap++) {
          for (int j = 0; j < M; j++) {
            Vector<T, N> v;
            load<T, N>(v, line + tap->bin * C + j * N);
            sum[j] += tap->weight * v;
          }
        }
        for (int j = 0; j < M; j++) {
          store<T, N>(target + j * N, sum[j]);
        }
      }
    }
  });
}

#define KERNELS(NAME, VECTOR_BYTES, TARGET)                                                                          \
  template <typename T>                                                                                              \
  TARGET void forward_##NAME(                                                                                        \
      const Map<const T>& map, const Taps<T>& rows, const Taps<T>& columns, const Bins& bins, T* output,             \
      T* scratch) {                                                                                                  \
    forward_roi<VECTOR_BYTES>(map, rows, columns, bins, output, scratch);                                            \
  }                                                                                                                  \
  template <typename T>                                                                                              \
  TARGET void backward_##NAME(                                                                                       \
      const Map<T>& map, const Taps<T>& rows, const Taps<T>& columns, const Bins& bins, const T* grad, T* scratch) { \
    backward_roi<VECTOR_BYTES>(map, rows, columns, bins, grad, scratch);                                             \
  }

FOR_EACH_INSTRUCTION_SET(KERNELS)

// ---------------------------------------------------------------- checks and set-up

// ROIs of a batch of maps, [R, 5] (index of the image, x1, y1, x2, y2).
template <typename T>
struct Rois {
  Tensor tensor;
  const T* data;
  T scale;
  Bins bins;
  int64_t sampling_ratio, height, width;
  bool aligned;

  Rois(
      const Tensor& rois, double spatial_scale, int64_t pooled_height, int64_t pooled_width, int64_t sampling_ratio,
      bool aligned, int64_t batch, int64_t height, int64_t width)
      : tensor(rois.contiguous()),
        data(tensor.const_data_ptr<T>()),
        scale(spatial_scale),
        bins{pooled_height, pooled_width},
        sampling_ratio(sampling_ratio),
        height(height),
        width(width),
        aligned(aligned) {
    for (int64_t r = 0; r < count(); r++) {
      const T index = data[r * 5];
      TORCH_CHECK(index >= 0 && index < batch, "roi_align: ROI ", r, " is of image ", index, " of ", batch);
    }
  }

  int64_t count() const {
    return tensor.size(0);
  }

  int64_t image(int64_t r) const {
    return data[r * 5];
  }

  // The taps of ROI r: rows sorted by cell, columns by bin.
  void find(int64_t r, Taps<T>& rows, Taps<T>& columns) const {
    const T* box = data + r * 5 + 1;
    const T offset = aligned ? 0.5 : 0;
    T start[2], size[2];
    for (int axis = 0; axis < 2; axis++) {
      start[axis] = box[axis] * scale - offset;
      size[axis] = box[axis + 2] * scale - offset - start[axis];
      if (!aligned && size[axis] < 1) {
        size[axis] = 1;
      }
    }
    find_taps(columns, start[0], size[0], bins.width, sampling_ratio, width);
    find_taps(rows, start[1], size[1], bins.height, sampling_ratio, height);
    sort_by_cell(rows);
    if (rows.empty() || columns.empty()) {
      rows.clear();
      columns.clear();
    }
  }
};

void check(const Tensor& features, const Tensor& rois, int64_t pooled_height, int64_t pooled_width) {
  TORCH_CHECK(features.device().is_cpu() && rois.device().is_cpu(), "roi_align: expected tensors on the CPU");
  TORCH_CHECK(features.dim() == 4, "roi_align: expected four dimensions, got ", features.sizes());
  TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5, "roi_align: rois must be [R, 5], got ", rois.sizes());
  TORCH_CHECK(
      rois.scalar_type() == features.scalar_type(), "roi_align: rois are ", rois.scalar_type(), ", the features ",
      features.scalar_type());
  TORCH_CHECK(
      features.scalar_type() == at::kFloat || features.scalar_type() == at::kDouble,
      "roi_align: expected float32 or float64, got ", features.scalar_type());
  TORCH_CHECK(
      pooled_height > 0 && pooled_width > 0, "roi_align: an output of ", pooled_height, " x ", pooled_width, " bins");
}

template <typename T>
Tensor forward_typed(const Tensor& input, const Rois<T>& rois) {
  // What is channels last is read as it lies, whatever its other strides are.
  const Tensor features = input.stride(1) == 1 ? input : input.contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t channels = input.size(1);
  Tensor output = at::empty({rois.count(), channels, rois.bins.height, rois.bins.width}, input.options());
  const auto kernel = CHOOSE_KERNEL(forward, T);
  const T* data = features.const_data_ptr<T>();
  T* const output_data = output.mutable_data_ptr<T>();
  at::parallel_for(0, rois.count(), 1, [&](int64_t begin, int64_t end) {
    Taps<T> rows, columns;
    std::vector<T> scratch(scratch_size<T>(rois.bins));
    for (int64_t r = begin; r < end; r++) {
      rois.find(r, rows, columns);
      const Map<const T> map{
          data + rois.image(r) * features.stride(0), features.stride(2), features.stride(3), channels};
      kernel(map, rows, columns, rois.bins, output_data + r * output.stride(0), scratch.data());
    }
  });
  return output;
}

template <typename T>
Tensor backward_typed(const Tensor& grad_output, const Rois<T>& rois, int64_t batch, int64_t channels) {
  const Tensor grad = grad_output.contiguous();
  Tensor result = at::zeros({batch, rois.height, rois.width, channels}, grad.options());
  const auto kernel = CHOOSE_KERNEL(backward, T);
  const T* const grad_data = grad.const_data_ptr<T>();
  T* const data = result.mutable_data_ptr<T>();
  constexpr int64_t unit = 64 / sizeof(T);  // channels of a cache line, which no two threads should write to
  const int64_t units = (channels + unit - 1) / unit;
  at::parallel_for(0, batch * units, 1, [&](int64_t begin, int64_t end) {
    Taps<T> rows, columns;
    std::vector<T> scratch(scratch_size<T>(rois.bins));
    for (int64_t r = 0; r < rois.count(); r++) {
      const int64_t image = rois.image(r);
      const int64_t first = std::max(begin - image * units, int64_t(0)) * unit;
      const int64_t last = std::min(std::min(end - image * units, units) * unit, channels);
      if (first >= last) {
        continue;
      }
      rois.find(r, rows, columns);
      sort_by_cell(columns);
      const Map<T> map{
          data + image * result.stride(0) + first, result.stride(1), result.stride(2), last - first};
      kernel(
          map, rows, columns, rois.bins, grad_data + (r * channels + first) * rois.bins.height * rois.bins.width,
          scratch.data());
    }
  });
  return result.permute({0, 3, 1, 2});
}

Tensor roi_align_forward(
    const Tensor& input, const Tensor& rois, double spatial_scale, int64_t pooled_height, int64_t pooled_width,
    int64_t sampling_ratio, bool aligned) {
  check(input, rois, pooled_height, pooled_width);
  const auto typed = [&](auto zero) {
    return forward_typed<decltype(zero)>(
        input, {rois, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned, input.size(0),
                input.size(2), input.size(3)});
  };
  return input.scalar_type() == at::kFloat ? typed(0.0f) : typed(0.0);
}

Tensor roi_align_backward(
    const Tensor& grad, const Tensor& rois, double spatial_scale, int64_t pooled_height, int64_t pooled_width,
    int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t sampling_ratio, bool aligned) {
  check(grad, rois, pooled_height, pooled_width);
  TORCH_CHECK(
      grad.sizes() == at::IntArrayRef({rois.size(0), channels, pooled_height, pooled_width}) && batch >= 0 &&
          height >= 0 && width >= 0,
      "roi_align: the gradient of the output has sizes ", grad.sizes());
  const auto typed = [&](auto zero) {
    return backward_typed<decltype(zero)>(
        grad, {rois, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned, batch, height, width}, batch,
        channels);
  };
  return grad.scalar_type() == at::kFloat ? typed(0.0f) : typed(0.0);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(codetr_d2, m) {
  m.def(
      "_roi_align_cpp(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
      "int sampling_ratio, bool aligned) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_roi_align_cpp_backward(Tensor grad, Tensor rois, float spatial_scale, SymInt pooled_height, "
      "SymInt pooled_width, SymInt batch, SymInt channels, SymInt height, SymInt width, int sampling_ratio, "
      "bool aligned) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(codetr_d2, CPU, m) {
  m.impl("_roi_align_cpp", roi_align_forward);
  m.impl("_roi_align_cpp_backward", roi_align_backward);
}
