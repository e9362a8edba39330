"""The mixture of PAA against its formulas, written out for one object."""

import math
import warnings

import pytest
import torch

from codetr_d2.modeling.assigners.paa import MAX_LOSS, select_by_mixture


def fit(x):
    """Expectation maximisation of two Gaussians, on a list of floats: (weight, mean, variance) of each."""
    parts = [(0.5, min(x), 1.0), (0.5, max(x), 1.0)]
    last = -math.inf
    for _ in range(100):
        logs = [[log_density(v, *part) for part in parts] for v in x]
        totals = [math.log(sum(map(math.exp, row))) for row in logs]
        counts, parts = [], []
        for k in (0, 1):
            r = [math.exp(row[k] - total) for row, total in zip(logs, totals)]
            n = sum(r) + 10 * 2.0**-52
            mean = sum(a * b for a, b in zip(r, x)) / n
            counts.append(n)
            parts.append((mean, sum(a * b * b for a, b in zip(r, x)) / n - mean**2 + 1e-6))
        parts = [(n / sum(counts), *part) for n, part in zip(counts, parts)]
        likelihood = sum(totals) / len(x)
        if abs(likelihood - last) < 1e-3:
            break
        last = likelihood
    return parts


def log_density(x, weight, mean, variance):
    return math.log(weight) - math.log(2 * math.pi * variance) / 2 - (x - mean) ** 2 / (2 * variance)


def positives(losses):
    """Indices of the positives among the losses of an object's candidates, a list of floats."""
    if len(losses) < 2:
        return []
    parts = fit(losses)
    order = sorted(range(len(losses)), key=losses.__getitem__)
    logs = {i: [log_density(losses[i], *part) for part in parts] for i in order}
    small = [i for i in order if logs[i][0] >= logs[i][1]]
    best = max(range(len(small)), key=lambda k: sum(map(math.exp, logs[small[k]])), default=-1)
    return small[: best + 1]


@pytest.mark.parametrize("count", [2, 3, 9, 40])
def test_one_object(count):
    zeros = torch.zeros(count, dtype=torch.int64)
    numbers = set()
    for _ in range(20):
        losses = torch.cat((torch.rand(count // 3) + 0.5, torch.rand(count - count // 3) * 2 + 1))
        losses = losses[torch.randperm(count)]
        found = select_by_mixture(losses, zeros, zeros, topk=count)
        assert found.nonzero().squeeze(1).tolist() == sorted(positives(losses.double().tolist()))
        numbers.add(int(found.sum()))
    assert len(numbers) > 1 or count == 2


def test_candidates_are_the_best_of_each_level_and_object():
    losses, objects, levels = torch.rand(600) * 3, torch.randint(5, (600,)), torch.randint(4, (600,))
    expected = torch.zeros(600, dtype=torch.bool)
    for g in range(5):
        candidates = []
        for level in range(4):
            [index] = ((objects == g) & (levels == level)).nonzero(as_tuple=True)
            candidates += index[losses[index].argsort()[:7]].tolist()
        for k in positives(losses[candidates].double().tolist()):
            expected[candidates[k]] = True
    found = select_by_mixture(losses, objects, levels, topk=7)
    assert torch.equal(found, expected)
    assert set(objects[found].tolist()) == set(range(5))


def test_few_candidates():
    """One alone is not positive; objects without any are none of its business."""
    found = select_by_mixture(torch.tensor([0.5, 0.5, 0.7]), torch.tensor([4, 9, 9]), torch.tensor([0, 1, 3]))
    assert found.tolist() == [False, True, False]
    nothing = torch.zeros(0, dtype=torch.int64)
    assert select_by_mixture(torch.zeros(0), nothing, nothing).tolist() == []


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_losses_of_a_model_that_diverges(wrong, share):
    """They neither stop the training here nor fill its log; who sums them reports them."""
    zeros = torch.zeros(45, dtype=torch.int64)
    for factor in (1, MAX_LOSS):
        losses = torch.rand(45) * factor
        losses[: int(45 * share)] = wrong
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert 0 < select_by_mixture(losses, zeros, zeros, topk=45).sum() <= 45


def test_large_losses_of_few_candidates():
    """In float32 the variance of such is negative at times, which scikit-learn refuses."""
    zeros = torch.zeros(3, dtype=torch.int64)
    for _ in range(50):
        select_by_mixture(30 + torch.rand(3) * 0.01, zeros, zeros)
