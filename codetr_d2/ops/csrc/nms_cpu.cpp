// Non-maximum suppression on the CPU: torchvision's results, to the bit, with vectors over the boxes.

#include <ATen/core/Tensor.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/tensor.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "instruction_sets.h"

namespace {

using at::Tensor;

// Boxes by falling score, padded to whole vectors; `flags` of those that are suppressed are not zero.
template <typename T>
struct Boxes {
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Flag;
  std::vector<T> x1, y1, x2, y2, area;
  std::vector<Flag> flags;

  Boxes(const Tensor& boxes, const Tensor& order) {
    const int64_t count = boxes.size(0), padded = (count + 15) / 16 * 16;
    for (auto* numbers : {&x1, &y1, &x2, &y2, &area}) {
      numbers->resize(padded);
    }
    flags.resize(padded);
    const T* const box = boxes.const_data_ptr<T>();
    const int64_t* const index = order.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < count; i++) {
      const T* const sides = box + index[i] * 4;
      x1[i] = sides[0];
      y1[i] = sides[1];
      x2[i] = sides[2];
      y2[i] = sides[3];
      area[i] = (x2[i] - x1[i]) * (y2[i] - y1[i]);
    }
  }
};

// The value as it is rounded: the compiler must not join the product with what follows to one operation.
template <typename V>
ALWAYS_INLINE V rounded(V value) {
#if defined(__x86_64__)
  __asm__("" : "+x"(value));
#elif defined(__aarch64__)
  __asm__("" : "+w"(value));
#endif
  return value;
}

// Suppress what overlaps box i, of those behind it, by an IoU above the threshold.
template <int VECTOR_BYTES, typename T>
ALWAYS_INLINE void suppress(Boxes<T>& boxes, int64_t i, T threshold) {
  constexpr int N = VECTOR_BYTES / sizeof(T);
  typedef Vector<T, N> V;
  typedef Vector<typename Boxes<T>::Flag, N> Flags;
  const T x1 = boxes.x1[i], y1 = boxes.y1[i], x2 = boxes.x2[i], y2 = boxes.y2[i], area = boxes.area[i];
  for (int64_t j = (i + 1) / N * N; j < int64_t(boxes.flags.size()); j += N) {
    V left, top, right, bottom, areas;
    Flags flags;
    load<T, N>(left, &boxes.x1[j]);
    load<T, N>(top, &boxes.y1[j]);
    load<T, N>(right, &boxes.x2[j]);
    load<T, N>(bottom, &boxes.y2[j]);
    load<T, N>(areas, &boxes.area[j]);
    load<typename Boxes<T>::Flag, N>(flags, &boxes.flags[j]);
    V width = (right < x2 ? right : V{} + x2) - (left > x1 ? left : V{} + x1);
    V height = (bottom < y2 ? bottom : V{} + y2) - (top > y1 ? top : V{} + y1);
    width = width > 0 ? width : V{};
    height = height > 0 ? height : V{};
    const V intersection = rounded<V>(width * height);
    flags |= (Flags)(intersection / (area + areas - intersection) > threshold);
    store<typename Boxes<T>::Flag, N>(&boxes.flags[j], flags);
  }
}

// Append to `kept` the places of the boxes that are kept, in their order.
template <int VECTOR_BYTES, typename T>
ALWAYS_INLINE void keep(std::vector<int64_t>& kept, Boxes<T>& boxes, int64_t count, T threshold) {
  for (int64_t i = 0; i < count; i++) {
    if (!boxes.flags[i]) {
      kept.push_back(i);
      suppress<VECTOR_BYTES>(boxes, i, threshold);
    }
  }
}

#define KERNELS(NAME, VECTOR_BYTES, TARGET)                                                                    \
  template <typename T>                                                                                        \
  TARGET void keep_##NAME(std::vector<int64_t>& kept, Boxes<T>& boxes, int64_t count, T threshold) {           \
    keep<VECTOR_BYTES>(kept, boxes, count, threshold);                                                         \
  }

FOR_EACH_INSTRUCTION_SET(KERNELS)

template <typename T>
std::vector<int64_t> nms_typed(const Tensor& boxes, const Tensor& order, double iou_threshold) {
  T threshold = iou_threshold;
  if (double(threshold) > iou_threshold) {  // of all numbers T, the same ones are above it
    threshold = std::nextafter(threshold, -std::numeric_limits<T>::infinity());
  }
  Boxes<T> sorted(boxes, order);
  std::vector<int64_t> kept;
  CHOOSE_KERNEL(keep, T)(kept, sorted, boxes.size(0), threshold);
  return kept;
}

// Indices of the boxes that are kept, by falling score.
Tensor nms(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  TORCH_CHECK(boxes.device().is_cpu() && scores.device().is_cpu(), "nms: expected tensors on the CPU");
  TORCH_CHECK(
      boxes.dim() == 2 && boxes.size(1) == 4 && scores.sizes() == at::IntArrayRef({boxes.size(0)}),
      "nms: expected boxes [N, 4] and scores [N], got ", boxes.sizes(), " and ", scores.sizes());
  TORCH_CHECK(
      (boxes.scalar_type() == at::kFloat || boxes.scalar_type() == at::kDouble) &&
          scores.scalar_type() == boxes.scalar_type(),
      "nms: expected float32 or float64, got ", boxes.scalar_type(), " boxes and ", scores.scalar_type(), " scores");
  const Tensor order = std::get<1>(scores.sort(/*stable=*/true, 0, /*descending=*/true)).contiguous();
  const Tensor numbers = boxes.contiguous();
  const std::vector<int64_t> kept = boxes.scalar_type() == at::kFloat ? nms_typed<float>(numbers, order, iou_threshold)
                                                                      : nms_typed<double>(numbers, order, iou_threshold);
  return order.index_select(0, at::tensor(kept, order.options()));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(codetr_d2, m) {
  m.def("_nms_cpp(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor");
}

TORCH_LIBRARY_IMPL(codetr_d2, CPU, m) {
  m.impl("_nms_cpp", nms);
}
