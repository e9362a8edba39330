import pytest
import torch

from codetr_d2.modeling.auxiliary_pyramid import CoarserLevel, LevelsFromOne, auxiliary_level_class
from codetr_d2.modeling.neck import ConvGN
from codetr_d2.modeling.pyramid import Geometry, build_pyramid
from tests.small_model import build, make_batch, train_step


def make_memory(shape, image_sizes, batch_shape, size_divisibility=1):
    return build_pyramid([torch.randn(len(image_sizes), 32, *shape)], [16], image_sizes, batch_shape, size_divisibility)


def test_one_coarser_level():
    """Of several levels the parameters and their order are those of the published models."""
    module = auxiliary_level_class(2)(32)
    assert type(module) is CoarserLevel and module.strides([8, 16]) == [8, 16, 32]
    assert [name for name, _ in module.named_parameters()] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    maps = [torch.randn(2, 32, 8, 12), torch.randn(2, 32, 4, 6)]
    pyramid = module(build_pyramid(maps, [8, 16], [(64, 96), (33, 48)], (64, 96)))
    assert pyramid.geometry.strides == [8, 16, 32]
    torch.testing.assert_close(pyramid.maps()[2], ConvGN.forward(module, maps[1]))
    assert torch.equal(pyramid.maps()[0], maps[0]) and torch.equal(pyramid.maps()[1], maps[1])


@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (1, 1), (3, 1)])
def test_five_levels_of_one(shape):
    module = auxiliary_level_class(1)(32)
    assert type(module) is LevelsFromOne
    batch_shape = tuple(16 * x - 3 for x in shape)
    image_sizes = [batch_shape, tuple(x // 2 + 1 for x in batch_shape)]
    memory = make_memory(shape, image_sizes, batch_shape, size_divisibility=32)
    pyramid = module(memory)
    strides = [8, 16, 32, 64, 128]
    assert module.strides([16]) == strides
    shapes = [(2 * shape[0], 2 * shape[1]), *(tuple(-(-x // 2**i) for x in shape) for i in range(4))]
    expected = Geometry.build(shapes, strides, image_sizes, batch_shape, size_divisibility=32)
    for name in ("shapes", "strides", "image_sizes", "batch_shape", "padded_sizes"):
        assert getattr(pyramid.geometry, name) == getattr(expected, name), name
    assert torch.equal(pyramid.geometry.padding_mask, expected.padding_mask)
    assert torch.equal(pyramid.geometry.cell_centres, expected.cell_centres)
    assert [tuple(x.shape) for x in pyramid.maps()] == [(2, 32, *x) for x in shapes]
    assert pyramid.tokens.isfinite().all()
    pyramid.tokens.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def levels_before_convolutions(memory):
    module, levels = LevelsFromOne(32), []
    for conv in module.convs:
        conv.register_forward_pre_hook(lambda module, args: levels.append(args[0]))
    module(memory)
    return levels


@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (1, 3)])
def test_a_constant_map_stays_constant(shape):
    batch_shape = tuple(16 * x for x in shape)
    memory = make_memory(shape, [batch_shape], batch_shape)
    memory.tokens = torch.full_like(memory.tokens, 3.0)
    for level in levels_before_convolutions(memory):
        torch.testing.assert_close(level, torch.full_like(level, 3.0))


def test_what_is_sampled_stays_in_its_place():
    """A map that rises with the coordinates, in pixels, does so on every level, but at the rim of the finest."""
    memory = make_memory((16, 24), [(256, 384)], (256, 384))
    x, y = 16 * (torch.arange(24.0) + 0.5), 16 * (torch.arange(16.0) + 0.5)
    values = (x + 1000 * y[:, None]).flatten()
    memory.tokens = values.view(1, -1, 1).expand(1, -1, 32)
    for stride, level in zip((8, 16, 32, 64, 128), levels_before_convolutions(memory)):
        height, width = level.shape[-2:]
        x, y = (stride * (torch.arange(float(n)) + 0.5) for n in (width, height))
        rim = 1 if stride == 8 else 0
        inner = (slice(rim, height - rim), slice(rim, width - rim))
        torch.testing.assert_close(level[0, 0][inner], (x + 1000 * y[:, None])[inner])


@pytest.mark.slow
@pytest.mark.parametrize("query_head", ["CoDeformableDETRHead", "CoDINOHead", "ConditionalDETRHead"])
def test_one_level_with_any_query_head(query_head):
    """The heads' levels are those that they were built for, in training and when they are asked alone."""
    one_level = ["MODEL.CODETR.IN_FEATURES", ["stride16"], "MODEL.CODETR.NUM_FEATURE_LEVELS", 1]
    anchors = ["MODEL.ANCHOR_GENERATOR.SIZES", [[4 * 2.0**i] for i in range(3, 8)]]
    model = build("MODEL.CODETR.QUERY_HEAD", query_head, *one_level, *anchors, "MODEL.CODETR.EVAL_HEAD", "atss")
    losses = train_step(model, make_batch(2, 1))
    assert all(x.isfinite() for x in losses.values()) and "loss_rpn_cls_roi" in losses
    assert all(p.grad.any() for name, p in model.auxiliary_level.named_parameters() if "weight" in name)
    assert model.auxiliary_heads["roi"].level_names == ["p3", "p4", "p5", "p6", "p7"]
    with torch.no_grad():
        assert len(model.eval()(make_batch(0))[0]["instances"]) > 0
