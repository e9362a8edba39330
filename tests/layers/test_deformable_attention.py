"""The deformable attention module against its formula written out in loops."""

import math

import pytest
import torch

from codetr_d2.layers import deformable_attention
from codetr_d2.layers.deformable_attention import MultiScaleDeformableAttention
from codetr_d2.ops import ms_deform_attn_eager

SHAPES = [(5, 7), (3, 4), (2, 2)]


def make_case(reference_size=2, queries=6, dtype=torch.float32, backend="auto"):
    """A module with random parameters, and its inputs."""
    batch, embed_dim = 2, 24
    module = MultiScaleDeformableAttention(embed_dim, 4, len(SHAPES), 3, backend).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = sum(height * width for height, width in SHAPES)
    query = torch.randn(batch, queries, embed_dim, dtype=dtype)
    value = torch.randn(batch, tokens, embed_dim, dtype=dtype)
    reference = torch.rand(batch, queries, len(SHAPES), reference_size, dtype=dtype)
    padding_mask = torch.rand(batch, tokens) < 0.3
    return module, query, value, reference, SHAPES, padding_mask


@pytest.mark.parametrize("reference_size", [2, 4])
@pytest.mark.parametrize("padding", [False, True])
def test_equals_the_formula(reference_size, padding):
    module, query, value, reference, shapes, mask = make_case(reference_size, dtype=torch.float64)
    heads, points = module.num_heads, module.num_points
    values = module.value_proj(value)
    if padding:
        values = torch.where(mask[..., None], torch.zeros_like(values), values)
    offsets = module.sampling_offsets(query)
    weights = module.attention_weights(query)
    locations = torch.empty(*query.shape[:2], heads, len(SHAPES), points, 2, dtype=torch.float64)
    shares = torch.empty(locations.shape[:-1], dtype=torch.float64)
    for head in range(heads):
        per_head = len(SHAPES) * points
        shares[:, :, head] = (
            weights[..., head * per_head : (head + 1) * per_head].softmax(-1).unflatten(2, (-1, points))
        )
        for level, (height, width) in enumerate(SHAPES):
            for point in range(points):
                column = 2 * ((head * len(SHAPES) + level) * points + point)
                for axis, size in enumerate((width, height)):
                    offset = offsets[..., column + axis]
                    if reference_size == 2:
                        offset = offset / size
                    else:
                        offset = offset / points * reference[:, :, level, 2 + axis] * 0.5
                    locations[:, :, head, level, point, axis] = reference[:, :, level, axis] + offset
    expected = module.output_proj(
        ms_deform_attn_eager(
            values.unflatten(2, (heads, -1)), [size for shape in shapes for size in shape], locations, shares
        )
    )
    output = module(query, value, reference, shapes, mask if padding else None)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


def test_parameters_and_their_initial_values():
    module = MultiScaleDeformableAttention()
    assert {name: tuple(parameter.shape) for name, parameter in module.named_parameters()} == {
        "sampling_offsets.weight": (256, 256),
        "sampling_offsets.bias": (256,),
        "attention_weights.weight": (128, 256),
        "attention_weights.bias": (128,),
        "value_proj.weight": (256, 256),
        "value_proj.bias": (256,),
        "output_proj.weight": (256, 256),
        "output_proj.bias": (256,),
    }
    for name in ("sampling_offsets.weight", "attention_weights.weight", "attention_weights.bias"):
        assert module.get_parameter(name).abs().max() == 0
    # The eight directions along the axes and diagonals, 1 to 4 cells far, the same on every level.
    directions = torch.tensor(
        [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)], dtype=torch.float32
    )
    bias = module.sampling_offsets.bias.detach().view(8, 4, 4, 2)
    for level in range(4):
        for point in range(4):
            torch.testing.assert_close(bias[:, level, point], directions * (point + 1), rtol=0, atol=1e-5)
    for projection in (module.value_proj, module.output_proj):
        assert projection.bias.abs().max() == 0
        bound = math.sqrt(6 / 512)
        assert 0.95 * bound < projection.weight.abs().max() <= bound


@pytest.mark.parametrize("reference_size", [2, 4])
def test_no_queries(reference_size):
    module, query, value, reference, shapes, mask = make_case(reference_size, queries=0)
    assert module(query, value, reference, shapes, mask).shape == (2, 0, 24)


def test_padded_values_don_t_matter():
    module, query, value, reference, shapes, mask = make_case()
    other = torch.where(mask[..., None], torch.randn_like(value) * 100, value)
    expected = module(query, value, reference, shapes, mask)
    torch.testing.assert_close(module(query, other, reference, shapes, mask), expected)
    assert not torch.allclose(module(query, other, reference, shapes), expected)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_every_parameter_and_input_gets_its_gradient(backend):
    module, query, value, reference, *rest = make_case(4, backend=backend)
    inputs = [x.requires_grad_() for x in (query, value, reference)]
    module(*inputs, *rest).square().sum().backward()
    for x in (*inputs, *module.parameters()):
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_autocast_keeps_locations_and_weights_at_full_precision(monkeypatch):
    module, *inputs = make_case(4)
    expected = module(*inputs)
    dtypes = []

    def spy(value, shapes, locations, weights, backend):
        dtypes.append((value.dtype, locations.dtype, weights.dtype))
        return original(value, shapes, locations, weights, backend)

    original = deformable_attention.ms_deform_attn
    monkeypatch.setattr(deformable_attention, "ms_deform_attn", spy)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(*inputs)
    assert dtypes == [(torch.bfloat16, torch.float32, torch.float32)]
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    output.float().sum().backward()
    assert module.sampling_offsets.weight.grad.isfinite().all()


def test_compiler_and_export_see_one_operator():
    module, *inputs = make_case()
    expected = module(*inputs)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    output = compiled(*inputs)
    torch.testing.assert_close(output, expected)
    gradients = torch.autograd.grad(output.sum(), list(module.parameters()))
    for gradient, reference in zip(gradients, torch.autograd.grad(expected.sum(), list(module.parameters()))):
        torch.testing.assert_close(gradient, reference)


class _OfMaps(torch.nn.Module):
    """Self-attention of the cells of two maps, whose sizes are those of its input."""

    def __init__(self, backend):
        super().__init__()
        self.attention = MultiScaleDeformableAttention(24, 4, 2, 3, backend)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.3)

    def forward(self, fine, coarse):
        tokens = torch.cat([x.flatten(2).mT for x in (fine, coarse)], dim=1)
        reference = tokens[..., :2].sigmoid().unsqueeze(2).expand(-1, -1, 2, -1)
        return self.attention(tokens, tokens, reference, [tuple(x.shape[-2:]) for x in (fine, coarse)])


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_export_with_dynamic_sizes(backend):
    """One program for maps of all sizes: the sizes are numbers, which nothing needs to read from a tensor."""
    module = _OfMaps(backend).eval()
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    sizes = ({2: 2 * height, 3: 2 * width}, {2: height, 3: width})
    program = torch.export.export(module, (torch.randn(1, 24, 8, 12), torch.randn(1, 24, 4, 6)), dynamic_shapes=sizes)
    operators = [str(node.target) for node in program.graph.nodes if "deform" in str(node.target)]
    assert operators == (["codetr_d2.ms_deform_attn.default"] if backend == "auto" else [])
    for h, w in ((4, 6), (7, 3)):
        inputs = torch.randn(1, 24, 2 * h, 2 * w), torch.randn(1, 24, h, w)
        torch.testing.assert_close(program.module()(*inputs), module(*inputs))


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda x: x[..., :-1], r"query must be \[B, Q, 24\], got \(2, 6, 23\)"),
        (1, lambda x: x[:1], r"value must be \[2, S, 24\]"),
        (2, lambda x: x[..., :1], r"reference_points must be \(2, 6, 3, 2\) or \(2, 6, 3, 4\), got \(2, 6, 3, 1\)"),
        (2, lambda x: x[:, :, 0], "reference_points must be"),
        (3, lambda x: x[:2], r"spatial_shapes must be 3 pairs \(height, width\)"),
        (4, lambda x: x.float(), "padding_mask must be bool"),
        (4, lambda x: x[:, :-1], r"padding_mask must be bool \(2, 51\)"),
    ],
)
def test_sizes_that_do_not_fit(index, change, message):
    module, *inputs = make_case()
    inputs[index] = change(inputs[index])
    with pytest.raises(ValueError, match=message):
        module(*inputs)


def test_channels_that_the_heads_cannot_share():
    with pytest.raises(ValueError, match="embed_dim 30 is not a multiple of num_heads 4"):
        MultiScaleDeformableAttention(30, 4)
