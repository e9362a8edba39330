import dataclasses

import pytest
import torch

from codetr_d2.layers import inverse_sigmoid
from codetr_d2.modeling.structures import QueryGroup
from codetr_d2.modeling.transformer import DeformableDecoder


@pytest.fixture
def decoder():
    decoder = DeformableDecoder(
        embed_dim=32, num_classes=5, num_layers=3, num_heads=4, num_levels=2, num_points=2, ffn_dim=64
    )
    for branch in decoder.box_embed:  # they start at zero; here boxes shall move
        torch.nn.init.normal_(branch[-1].weight, std=0.2)
    return decoder


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
        torch.testing.assert_close(together.logits, alone.logits)
        torch.testing.assert_close(together.boxes, alone.boxes)


def test_permutation_of_queries(decoder, memory):
    group = make_group("", 6)
    order = torch.randperm(6)
    shuffled = QueryGroup("", group.content[:, order], group.reference_boxes[:, order], group.position[:, order])
    [expected], [output] = decoder([group], memory), decoder([shuffled], memory)
    torch.testing.assert_close(output.boxes, expected.boxes[:, :, order])
    torch.testing.assert_close(output.logits, expected.logits[:, :, order], rtol=1e-4, atol=1e-5)


def test_empty_slots_change_nothing(decoder, memory):
    group = make_group("_aux_roi", 6)
    group.padding_mask = torch.tensor([[False] * 4 + [True] * 2, [False] * 6])
    [masked] = decoder([group], memory)
    part = QueryGroup("", group.content[:, :4], group.reference_boxes[:, :4], group.position[:, :4])
    [alone] = decoder([part], memory)
    torch.testing.assert_close(masked.boxes[:, 0, :4], alone.boxes[:, 0])
    full = dataclasses.replace(group, padding_mask=None)
    torch.testing.assert_close(masked.boxes[:, 1], decoder([full], memory)[0].boxes[:, 1])
    group.padding_mask = torch.ones(2, 6, dtype=torch.bool)  # not one query in the group
    assert torch.isfinite(decoder([group], memory)[0].logits).all()


def test_boxes_look_forward_twice(decoder, memory):
    """A layer's box trains its own branch and the one before, but nothing earlier; each box refines the one before."""
    decoder.eval()
    [output] = decoder([make_group("", 5)], memory)
    for layer in range(3):
        decoder.zero_grad()
        output.boxes[layer].sum().backward(retain_graph=True)
        trained = [branch[-1].weight.grad is not None and branch[-1].weight.grad.any() for branch in decoder.box_embed]
        assert [bool(x) for x in trained] == [layer - 1 <= i <= layer for i in range(3)]
    for layer in (1, 2):
        delta = decoder.box_embed[layer](output.states[layer])
        expected = (delta + inverse_sigmoid(output.boxes[layer - 1], 1e-5)).sigmoid()
        torch.testing.assert_close(output.boxes[layer], expected)


def test_activation_checkpointing_gives_the_same_gradients(decoder, memory):
    groups = [make_group("", 5), make_group("_aux_roi", 3)]
    gradients = []
    decoder.train()
    for decoder.activation_checkpointing in (False, True):
        decoder.zero_grad()
        sum((x.logits.sum() + x.boxes.sum()) for x in decoder(groups, memory)).backward()
        gradients.append([p.grad.clone() for p in decoder.parameters()])
    for plain, recomputed in zip(*gradients):
        assert torch.equal(plain, recomputed)


@pytest.fixture
def dino_decoder():
    decoder = DeformableDecoder(
        embed_dim=32,
        num_classes=5,
        num_layers=3,
        num_heads=4,
        num_levels=2,
        num_points=2,
        ffn_dim=64,
        position_from_boxes=True,
        final_norm=True,
        reference_eps=1e-3,
    )
    for branch in decoder.box_embed:
        torch.nn.init.normal_(branch[-1].weight, std=0.2)
    return decoder


def test_dino_refines_along_two_paths(dino_decoder, memory):
    """Boxes come from the normalised states, reference boxes from the raw ones, with the same branches."""
    group = dataclasses.replace(make_group("", 5), position=None)
    states = []
    for layer in dino_decoder.layers:
        layer.register_forward_hook(lambda module, args, x: states.append(x))
    [output] = dino_decoder([group], memory)
    assert torch.equal(output.references[0], group.reference_boxes)
    for layer, (state, branch) in enumerate(zip(states, dino_decoder.box_embed)):
        logit = inverse_sigmoid(output.references[layer], 1e-3)
        torch.testing.assert_close(output.references[layer + 1], (branch(state) + logit).sigmoid())
        torch.testing.assert_close(output.boxes[layer], (branch(dino_decoder.norm(state)) + logit).sigmoid())
        torch.testing.assert_close(output.states[layer], dino_decoder.norm(state))


def test_group_that_sees_the_one_before(dino_decoder, memory):
    """Denoising queries change with the matching ones, which do not change with them; copies do not see each other."""
    matching, noised = make_group("", 4), make_group("_dn", 6)
    copies = torch.arange(6) // 3
    noised = dataclasses.replace(noised, attention_mask=copies[:, None] == copies, sees_previous=True)
    other = dataclasses.replace(matching, content=matching.content + 1)
    changed = dataclasses.replace(noised, content=noised.content + (copies == 1)[:, None])
    with torch.no_grad():
        alone = dino_decoder([matching], memory)[0].logits
        first, second = (x.logits for x in dino_decoder([matching, noised], memory))
        torch.testing.assert_close(first, alone)
        assert not torch.allclose(dino_decoder([other, noised], memory)[1].logits, second, atol=1e-3)
        after = dino_decoder([matching, changed], memory)[1].logits
    torch.testing.assert_close(after[:, :, :3], second[:, :, :3])
    assert not torch.allclose(after[:, :, 3:], second[:, :, 3:], atol=1e-3)
