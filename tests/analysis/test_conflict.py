"""Conflict between heads, against cases worked by hand."""

import copy
import json
import math

import pytest
import torch

from codetr_d2.analysis.conflict import (
    attention_of_heads,
    conflict_of_head,
    distribution,
    grad_cam,
    kl_divergence,
    measure_conflict,
)
from codetr_d2.analysis.models import load_model
from codetr_d2.errors import InputError
from codetr_d2.modeling.auxiliary import AUX_HEAD_REGISTRY
from tests.small_model import build, make_batch
from tests.tiny_detector import write_dataset
from tests.tiny_run import write_tiny_run

HEADS = sorted(name for name, _ in AUX_HEAD_REGISTRY)


def test_divergence_by_hand():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    assert kl_divergence(p, q) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert kl_divergence(q, p) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert kl_divergence(p, p) == 0


def test_grad_cam_by_hand():
    """The mean gradients of the first level are (1, -1), of the second (0, 2)."""
    levels = [torch.tensor([[3.0, 1.0], [1.0, 5.0]]), torch.tensor([[7.0, 0.5]])]
    gradients = [torch.tensor([[2.0, -2.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0]])]
    assert grad_cam(levels, gradients).tolist() == [2.0, 0.0, 1.0]


def test_a_distribution_has_no_zeros():
    e = math.e
    found = distribution(torch.tensor([3.0, 0.0, 1.5]))
    expected = torch.tensor([e, 1, e**0.5], dtype=torch.float64) / (e + 1 + e**0.5)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(distribution(torch.zeros(4)), torch.full((4,), 0.25, dtype=torch.float64))


def test_the_scale_of_a_map_does_not_matter():
    values = torch.rand(50)
    torch.testing.assert_close(distribution(values), distribution(1e-6 * values))


def test_the_conflict_of_a_head_is_the_mean_with_the_others():
    matrix = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 4.0], [5.0, 6.0, 0.0]])
    assert conflict_of_head(matrix).tolist() == [(1 + 2 + 3 + 5) / 4, (3 + 4 + 1 + 6) / 4, (5 + 6 + 2 + 4) / 4]


def test_identical_heads_look_at_the_same_place():
    model = build(aux_heads=("atss", "atss", "roi")).eval()
    model.auxiliary_heads["atss2"] = copy.deepcopy(model.auxiliary_heads["atss"])
    found = attention_of_heads(model, make_batch(1)[0])
    assert kl_divergence(found["atss"], found["atss2"]) == 0
    assert kl_divergence(found["atss"], found["roi"]) > 0 and kl_divergence(found["atss"], found["detector"]) > 0


@pytest.mark.parametrize("head", ["CoDeformableDETRHead", "ConditionalDETRHead"])
def test_every_head_looks_somewhere(head):
    model = build("MODEL.CODETR.QUERY_HEAD", head, aux_heads=HEADS).eval()
    found = attention_of_heads(model, make_batch(1)[0])
    assert list(found) == ["detector", *HEADS]
    for p in found.values():
        assert p.sum().item() == pytest.approx(1)
        assert p.max() / p.min() == pytest.approx(math.e, rel=1e-3)  # a cell of the largest value, and one of 0
    assert all(x.grad is None for x in model.parameters())


def test_the_measurement(tmp_path):
    datasets = [write_dataset(tmp_path, name, 3, 0) for name in ("conflict_train", "conflict_test")]
    opts = ("MODEL.DEVICE", "cpu", "MODEL.CODETR.NUM_CLASSES", 3, "MODEL.CODETR.CLASS_NAMES", [])
    models = []
    for name, heads in (("both", ["roi", "atss"]), ("none", [])):
        write_tiny_run(tmp_path / name, datasets, (*opts, "MODEL.CODETR.AUX_HEADS", heads))
        models.append(load_model(name, str(tmp_path / name / "config.yaml"), str(tmp_path / name / "model_final.pth")))
    rows = measure_conflict(models[:1], 2, tmp_path)
    assert [(x["head"], x["to"]) for x in rows] == [
        *(("detector", "roi"), ("detector", "atss"), ("roi", "detector")),
        *(("roi", "atss"), ("atss", "detector"), ("atss", "roi")),
    ]
    assert all(x["S_ij"] > 0 and x["images"] == 2 for x in rows)
    assert json.loads((tmp_path / "conflict.json").read_text()) == rows and (tmp_path / "conflict.png").exists()
    with pytest.raises(InputError, match="none has no auxiliary heads"):
        measure_conflict(models[1:], 2, tmp_path)
