import dataclasses

import pytest
import torch

from codetr_d2.modeling.queries import PositiveQueries, select_samples
from codetr_d2.modeling.structures import PositiveSamples

NUM_CLASSES = 5


def make_samples(*num_positives: int, num_negatives: int = 20) -> PositiveSamples:
    """Candidates whose boxes, targets and features tell their index: positives are spread among negatives."""
    samples = PositiveSamples([], [], [], [])
    for n in num_positives:
        total = n + num_negatives
        labels = torch.full((total,), NUM_CLASSES)
        labels[torch.randperm(total)[:n]] = torch.randint(NUM_CLASSES, (n,))
        index = torch.arange(total, dtype=torch.float32)[:, None]
        samples.boxes.append(torch.cat((index, index, index + 10, index + 12), dim=1))
        samples.labels.append(labels)
        samples.target_boxes.append(samples.boxes[-1] + 0.5)
        samples.features.append(index.repeat(1, 8).requires_grad_())
    return samples


@pytest.mark.parametrize("padding", ["negatives", "mask"])
def test_selected_candidates(padding):
    samples = make_samples(12, 4, 0)
    chosen = select_samples(samples, NUM_CLASSES, max_per_head=300, min_per_head=9, padding=padding)
    assert chosen.boxes.shape == (3, 12, 4)
    for i, n in enumerate((12, 4, 0)):
        assert (chosen.labels[i, :n] < NUM_CLASSES).all() and (chosen.labels[i, n:] == NUM_CLASSES).all()
        index = chosen.boxes[i, :, 0].long()
        held = index if padding == "negatives" else index[:n]
        assert len(set(held.tolist())) == len(held)  # none twice
        k = len(held)
        assert torch.equal(samples.labels[i][held], chosen.labels[i, :k])
        assert torch.equal(chosen.target_boxes[i, :k, 0], held + 0.5)
        assert torch.equal(chosen.features[i, :k, 0], held.float())
    if padding == "negatives":
        assert chosen.padding_mask is None
    else:
        assert chosen.padding_mask.sum(1).tolist() == [0, 8, 12]


@pytest.mark.parametrize("padding", ["negatives", "mask"])
def test_candidates_of_a_cell_share_its_feature(padding):
    """As if each had a copy of it."""
    samples = make_samples(12, 4, 0, num_negatives=24)
    samples.features = [x[: len(x) // 4].detach() for x in samples.features]
    copies = dataclasses.replace(samples, features=[x.repeat_interleave(4, dim=0) for x in samples.features])
    chosen = []
    for x in (samples, copies):
        torch.manual_seed(0)
        chosen.append(select_samples(x, NUM_CLASSES, max_per_head=300, min_per_head=9, padding=padding))
    assert torch.equal(chosen[0].features, chosen[1].features)
    assert torch.equal(chosen[0].boxes, chosen[1].boxes) and chosen[0].features.max() > 5


@pytest.mark.parametrize(("num_positives", "slots"), [((0, 0), 9), ((3, 8), 9), ((10, 2), 10), ((50, 2), 30)])
def test_number_of_slots(num_positives, slots):
    chosen = select_samples(make_samples(*num_positives, num_negatives=60), NUM_CLASSES, 30, 9, "negatives")
    assert chosen.labels.shape == (2, slots)
    assert (chosen.labels < NUM_CLASSES).sum(1).tolist() == [min(n, slots) for n in num_positives]


def test_the_choice_is_random():
    """Of too many positives and of the negatives that fill up, every one is chosen in a share of the draws."""
    samples = make_samples(20, 2, num_negatives=30)
    num_draws, num_slots = 200, 8
    times_chosen = [torch.zeros(len(labels)) for labels in samples.labels]
    for _ in range(num_draws):
        chosen = select_samples(samples, NUM_CLASSES, num_slots, 1, "negatives")
        for times, boxes in zip(times_chosen, chosen.boxes):
            times[boxes[:, 0].long()] += 1
    first, second = times_chosen
    is_positive = [labels < NUM_CLASSES for labels in samples.labels]
    assert (first[~is_positive[0]] == 0).all() and (second[is_positive[1]] == num_draws).all()
    # 80 draws expected of 200 (a standard deviation is 7), and 40 (6).
    assert ((first[is_positive[0]] > 45) & (first[is_positive[0]] < 115)).all()
    assert ((second[~is_positive[1]] > 10) & (second[~is_positive[1]] < 70)).all()


def test_too_few_candidates_leave_empty_slots():
    chosen = select_samples(make_samples(2, 12, num_negatives=3), NUM_CLASSES, 300, 9, "negatives")
    assert chosen.padding_mask.sum(1).tolist() == [7, 0]


def test_queries_of_content_alone():
    """Co-DINO's: positions are the decoder's to make, and features are not used."""
    module = PositiveQueries(8, NUM_CLASSES, 300, 4, "negatives", content_only=True)
    samples = make_samples(5, 3)
    group = module(samples, torch.tensor([[100.0, 50, 100, 50], [80, 80, 80, 80]]), name="_aux_roi")
    assert group.position is None and group.content.shape == (2, 5, 8)
    group.content.square().sum().backward()
    assert all(p.grad is not None for p in module.parameters()) and samples.features[0].grad is None


def test_queries():
    module = PositiveQueries(8, NUM_CLASSES, max_per_head=300, min_per_head=4, padding="negatives")
    samples = make_samples(5, 3)
    sizes = torch.tensor([[100.0, 50, 100, 50], [80, 80, 80, 80]])
    group = module(samples, sizes, name="_aux_roi")
    assert group.content.shape == group.position.shape == (2, 5, 8)
    # (index, index, index + 10, index + 12) -> centre and size, by the size of each image
    torch.testing.assert_close(group.reference_boxes[0, :, 2:], torch.tensor([[0.1, 0.24]]).expand(5, 2))
    torch.testing.assert_close(
        group.target_boxes[1, :3, :2], group.reference_boxes[1, :3, :2] + torch.tensor([0.5, 0.5]) / 80
    )
    # Features take their gradient back to the head; coordinates do not.
    assert not group.reference_boxes.requires_grad
    (group.content.square().sum() + group.position.sum()).backward()
    assert all(p.grad is not None for p in module.parameters())
    assert samples.features[0].grad is not None
