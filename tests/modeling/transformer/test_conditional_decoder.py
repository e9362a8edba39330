import dataclasses

import pytest
import torch

from codetr_d2.layers import SinePositionEncoding, inverse_sigmoid
from codetr_d2.modeling.pyramid import build_pyramid
from codetr_d2.modeling.structures import QueryGroup
from codetr_d2.modeling.transformer import ConditionalDecoder


def make_decoder(anchor_boxes, **options):
    decoder = ConditionalDecoder(
        position_encoding=SinePositionEncoding(32, temperature=20.0, offset=0.0),
        embed_dim=32,
        num_classes=5,
        num_layers=3,
        num_heads=4,
        ffn_dim=64,
        anchor_boxes=anchor_boxes,
        **options,
    )
    torch.nn.init.normal_(decoder.box_embed[-1].weight, std=0.2)  # it starts at zero; here boxes shall move
    return decoder


@pytest.fixture(params=[False, True], ids=["points", "anchor_boxes"])
def decoder(request):
    return make_decoder(request.param)


@pytest.fixture
def memory():
    """An encoder's output for two images of stride 16; the second has padding at the right and at the bottom."""
    return make_memory(torch.randn(2, 32, 4, 6), (4, 6), (3, 4))


def make_memory(level, *valid):
    return build_pyramid([level], [16], [(16 * h, 16 * w) for h, w in valid], tuple(16 * x for x in level.shape[-2:]))


def make_group(name: str, num_queries: int) -> QueryGroup:
    return QueryGroup(
        name=name,
        content=torch.randn(2, num_queries, 32),
        reference_boxes=torch.rand(2, num_queries, 4) * 0.5 + 0.2,
        position=torch.randn(2, num_queries, 32),
    )


def test_groups_together_equal_separate_passes(decoder, memory):
    groups = [make_group("", 7), make_group("_aux_roi", 4), make_group("_aux_atss", 9)]
    for group, together in zip(groups, decoder(groups, memory)):
        [alone] = decoder([group], memory)
        assert together.group is group
        for ours, expected in ((together.logits, alone.logits), (together.boxes, alone.boxes)):
            torch.testing.assert_close(ours, expected)
        assert together.logits.shape == (3, 2, group.num_queries, 5)
        assert together.references.shape == (4, 2, group.num_queries, 4)


def test_padding_and_the_batch_change_nothing(decoder):
    level = torch.randn(2, 32, 4, 6)
    padded = level.clone()
    padded[1, :, 3:] = padded[1, :, :, 4:] = 9.0
    group = make_group("", 6)
    [together] = decoder([group], make_memory(padded, (4, 6), (3, 4)))
    for i, alone in enumerate((make_memory(level[:1], (4, 6)), make_memory(level[1:, :, :3, :4], (3, 4)))):
        part = QueryGroup("", *(x[i : i + 1] for x in (group.content, group.reference_boxes, group.position)))
        [expected] = decoder([part], alone)
        torch.testing.assert_close(together.logits[:, i], expected.logits[:, 0])
        torch.testing.assert_close(together.boxes[:, i], expected.boxes[:, 0])


def test_empty_slots_change_nothing(decoder, memory):
    """Nor do they make anything infinite, though their boxes have no size."""
    group = make_group("_aux_roi", 6)
    group.padding_mask = torch.tensor([[False] * 4 + [True] * 2, [False] * 6])
    group.reference_boxes[0, 4:] = 0.0
    [masked] = decoder([group], memory)
    part = QueryGroup("", *(x[:, :4] for x in (group.content, group.reference_boxes, group.position)))
    [alone] = decoder([part], memory)
    torch.testing.assert_close(masked.boxes[:, 0, :4], alone.boxes[:, 0])
    assert masked.logits.isfinite().all() and masked.boxes.isfinite().all()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradients_with_and_without_recomputing(decoder, memory, dropout):
    decoder = make_decoder(decoder.anchor_boxes, dropout=dropout).train()
    groups = [make_group("", 5), make_group("_aux_roi", 3)]
    gradients = []
    for decoder.activation_checkpointing in (False, True):
        decoder.zero_grad()
        torch.manual_seed(1)
        sum((x.logits.square().sum() + x.boxes.square().sum()) for x in decoder(groups, memory)).backward()
        gradients.append([p.grad.clone() for p in decoder.parameters()])
    for plain, recomputed in zip(*gradients):
        assert plain.any() and plain.isfinite().all() and torch.equal(plain, recomputed)


def test_reference_points_stay(memory):
    """Boxes of all layers start from the same points, and the sides of the reference boxes don't matter."""
    decoder = make_decoder(anchor_boxes=False)
    group = make_group("", 5)
    points = group.reference_boxes[..., :2].clone().requires_grad_()
    sides = [group.reference_boxes[..., 2:], torch.rand(2, 5, 2)]
    [output], [other] = (
        decoder([dataclasses.replace(group, reference_boxes=torch.cat((points, x), dim=-1))], memory) for x in sides
    )
    assert torch.equal(output.boxes, other.boxes) and torch.equal(output.logits, other.logits)
    logits = decoder.box_embed(output.states)
    logits[..., :2] += inverse_sigmoid(points, 1e-5)
    torch.testing.assert_close(output.boxes, logits.sigmoid())
    for layer in range(3):  # the points are learned from every layer
        [gradient] = torch.autograd.grad(output.boxes[layer].sum(), points, retain_graph=True)
        assert gradient.any()


def test_anchor_boxes_are_refined(memory):
    """Of a layer's box, the gradient goes to the layer before it and no further, and so to the anchors from two."""
    decoder = make_decoder(anchor_boxes=True)
    group = dataclasses.replace(make_group("", 5), position=None)
    group.reference_boxes.requires_grad_()
    states = []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda module, args, x: states.append(x))
    [output] = decoder([group], memory)
    assert torch.equal(output.references[0], group.reference_boxes)
    for layer, state in enumerate(states):
        logit = inverse_sigmoid(output.references[layer], 1e-5)
        torch.testing.assert_close(output.references[layer + 1], (decoder.box_embed(state) + logit).sigmoid())
        torch.testing.assert_close(output.boxes[layer], (decoder.box_embed(output.states[layer]) + logit).sigmoid())
        torch.testing.assert_close(output.states[layer], decoder.final_norm(state))
    # What the anchors' gradient of a layer's box is made of, where states are as they are.
    decoder.zero_grad()
    blocked = [layer.register_forward_hook(lambda module, args, x: x.detach()) for layer in decoder.layers]
    [output] = decoder([group], memory)
    for hook in blocked:
        hook.remove()
    gradients = [
        torch.autograd.grad(output.boxes[i].sum(), group.reference_boxes, retain_graph=True, allow_unused=True)[0]
        for i in range(3)
    ]
    assert [x is not None and bool(x.any()) for x in gradients] == [True, True, False]


def test_attention_grows_with_the_box(memory):
    """Width and height modulate the attention each along its own axis."""
    decoder = make_decoder(anchor_boxes=True)
    spatial = []
    decoder.layers[0].register_forward_hook(lambda module, args, x: spatial.append(args[2]))
    group = dataclasses.replace(make_group("", 5), position=None)
    wide = dataclasses.replace(group, reference_boxes=group.reference_boxes * torch.tensor([1.0, 1.0, 2.0, 1.0]))
    decoder([group], memory), decoder([wide], memory)
    y, x = (b / a for a, b in zip(spatial[0].chunk(2, dim=-1), spatial[1].chunk(2, dim=-1)))
    torch.testing.assert_close(y, torch.ones_like(y))
    torch.testing.assert_close(x, torch.full_like(x, 0.5))


def test_bfloat16(decoder, memory):
    """Logits and boxes are float32 and near those of float32 under autocast."""
    group = make_group("", 6)
    [expected] = decoder([group], memory)
    with torch.autocast("cpu", torch.bfloat16):
        [output] = decoder([group], memory)
    assert output.logits.dtype == output.boxes.dtype == torch.float32
    torch.testing.assert_close(output.boxes, expected.boxes, rtol=0, atol=0.05)
    assert not torch.equal(output.boxes, expected.boxes)
