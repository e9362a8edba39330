// The operator codetr_d2::ms_deform_attn for a process without this package's Python: an exported program that calls it
// needs nothing but this library. On the CPU the kernels compute it, and elsewhere plain ATen, as eager.py does.
//
// Under Python the backends of operator.py go before it: they are registered for a device, and this one for any.

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/grid_sampler.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

namespace {

using at::Tensor;

// Checks the inputs too.
Tensor on_cpu(const Tensor& value, at::IntArrayRef shapes, const Tensor& locations, const Tensor& weights) {
  static const auto kernel = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("codetr_d2::_ms_deform_attn_cpp", "")
                                 .typed<Tensor(const Tensor&, at::IntArrayRef, const Tensor&, const Tensor&)>();
  return kernel.call(value, shapes, locations, weights);
}

Tensor by_grid_sample(const Tensor& value, at::IntArrayRef shapes, const Tensor& locations, const Tensor& weights) {
  TORCH_CHECK(
      value.dim() == 4 && locations.dim() == 6 && weights.dim() == 5 && (int64_t)shapes.size() == 2 * locations.size(3),
      "ms_deform_attn: inputs have sizes ", value.sizes(), ", ", shapes, ", ", locations.sizes(), ", ",
      weights.sizes());
  const auto dtype = c10::promoteTypes(value.scalar_type(), at::kFloat);
  const int64_t B = value.size(0), H = value.size(2), D = value.size(3), Q = locations.size(1);
  const Tensor features = value.to(dtype).permute({0, 2, 3, 1}).flatten(0, 1);  // [B*H, D, S]
  // A location that is not a number samples nothing, like one outside; the bounds lie outside a map of any size.
  const Tensor grids =
      (locations.to(dtype).nan_to_num(-2.0).clamp(-2.0, 3.0) * 2 - 1).transpose(1, 2).flatten(0, 1);
  const Tensor scales = weights.to(dtype).transpose(1, 2).flatten(0, 1).unsqueeze(1);  // [B*H, 1, Q, L, P]
  Tensor output = at::zeros({B * H, D, Q}, grids.options());
  int64_t start = 0;
  for (size_t l = 0; 2 * l < shapes.size(); l++) {
    const int64_t height = shapes[2 * l], width = shapes[2 * l + 1];
    const Tensor map = features.narrow(2, start, height * width).unflatten(2, {height, width});
    start += height * width;
    if (map.numel() > 0 && grids.numel() > 0) {
      const Tensor sampled = at::grid_sampler(map, grids.select(2, l), 0, 0, false);  // bilinear, zeros outside
      output = output + (sampled * scales.select(3, l)).sum(-1);
    }
  }
  TORCH_CHECK(start == value.size(1), "ms_deform_attn: ", shapes, " hold ", start, " tokens, value has ", value.size(1));
  return output.view({B, H * D, Q}).transpose(1, 2).to(value.scalar_type()).contiguous();
}

Tensor ms_deform_attn(
    const Tensor& value, at::IntArrayRef shapes, const Tensor& locations, const Tensor& weights,
    c10::string_view backend) {
  const auto dtype = value.scalar_type();
  const bool known = dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16;
  const bool on_kernels = backend == "cpp" || (backend == "auto" && value.is_cpu() && known);
  return on_kernels ? on_cpu(value, shapes, locations, weights) : by_grid_sample(value, shapes, locations, weights);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(codetr_d2, m) {
  m.def(
      "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights, "
      "str backend='auto') -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(codetr_d2, CompositeExplicitAutograd, m) {
  m.impl("ms_deform_attn", ms_deform_attn);
}
