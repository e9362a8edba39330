"""What every registered query head must do, and that a query head needs neither levels nor proposals."""

import pytest
import torch
from torch import nn

from codetr_d2.modeling.assigners.hungarian import HungarianMatcher
from codetr_d2.modeling.criterion import SetCriterion
from codetr_d2.modeling.pyramid import build_pyramid
from codetr_d2.modeling.queries import PositiveQueries
from codetr_d2.modeling.query_heads import QUERY_HEAD_REGISTRY, QueryHead
from codetr_d2.modeling.structures import DecoderOutput, PositiveSamples, QueryGroup
from tests.small_model import build, make_batch, train_step

every_head = pytest.mark.parametrize("query_head", [name for name, _ in QUERY_HEAD_REGISTRY])


def parameters_without_gradient(module):
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return [name for name, p in trained if p.grad is None or not torch.isfinite(p.grad).all()]


@every_head
@pytest.mark.parametrize(
    "num_classes, num_objects", [(10, (3, 1)), (10, (0, 2)), (10, (0, 0)), (1, (2, 1)), (37, (1, 4))]
)
def test_losses(query_head, num_classes, num_objects):
    """Finite, float32, in the graph of every parameter, for any number of classes and with images without objects."""
    model = build("MODEL.CODETR.QUERY_HEAD", query_head, "MODEL.CODETR.NUM_CLASSES", num_classes)
    batch = make_batch(*num_objects)
    for x in batch:
        x["instances"].gt_classes %= num_classes
    losses = train_step(model, batch)
    assert all(x.dtype == torch.float32 and torch.isfinite(x) for x in losses.values())
    assert parameters_without_gradient(model) == []


@every_head
def test_losses_under_autocast(query_head):
    model = build("MODEL.CODETR.QUERY_HEAD", query_head)
    batch = make_batch(3, 1)
    expected = train_step(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        losses = train_step(model, batch)
    assert losses.keys() == expected.keys()
    assert all(x.dtype == torch.float32 for x in losses.values())
    total, reference = (sum(x.item() for x in y.values()) for y in (losses, expected))
    assert abs(total - reference) < 0.05 * reference and total != reference


@every_head
@torch.no_grad()
def test_detections(query_head):
    """By falling score, inside of the image, and as many as asked for."""
    model = build("MODEL.CODETR.QUERY_HEAD", query_head, "TEST.DETECTIONS_PER_IMAGE", 15).eval()
    batch = make_batch(0, 0)
    together = [x["instances"] for x in model(batch)]
    for found, x in zip(together, batch):
        height, width = x["image"].shape[-2:]
        boxes = found.pred_boxes.tensor
        assert len(found) == 15 and (found.scores.diff() <= 0).all()
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height, width, height])).all()
        assert ((0 <= found.pred_classes) & (found.pred_classes < 10)).all()


@every_head
def test_candidates_of_another_head_are_an_error(query_head):
    """No loss is left out in silence where a head's candidates are missing."""
    model = build("MODEL.CODETR.QUERY_HEAD", query_head)
    memory = model.encode(model.features(model.preprocess(make_batch(1))))
    with pytest.raises(ValueError, match=r"candidates of \[\], but positive queries for \['roi', 'atss'\]"):
        model.query_head.losses(memory, {}, [])


class _OneMapHead(QueryHead):
    """The least that a query head can be: one map, learned reference boxes, no proposals."""

    def __init__(self, num_queries=6, dim=16, num_classes=3):
        super().__init__(
            encoder=nn.Linear(dim, dim),
            decoder=_OneLayer(dim, num_classes),
            positive_queries={"own": PositiveQueries(dim, num_classes, 10, 2, "mask", content_only=True)},
            criterion=SetCriterion(num_classes, HungarianMatcher(2.0, 5.0, 2.0), 2.0, 5.0, 2.0),
            embed_dim=dim,
            max_detections=5,
            positive_weight=0.5,
        )
        self.reference = nn.Parameter(torch.rand(num_queries, 4))
        self.content = nn.Parameter(torch.randn(num_queries, dim))

    def encode(self, pyramid):
        return pyramid.with_tokens(self.encoder(pyramid.tokens))

    def queries_and_proposals(self, memory):
        batch = len(memory.tokens)
        content, boxes = self.content.expand(batch, -1, -1), self.reference.sigmoid().expand(batch, -1, -1)
        return QueryGroup("", content, boxes), None


class _OneLayer(nn.Module):
    def __init__(self, dim, num_classes):
        super().__init__()
        self.classes, self.boxes = nn.Linear(dim, num_classes), nn.Linear(dim, 4)

    def forward(self, groups, pyramid):
        outputs = []
        for group in groups:
            states = group.content + pyramid.tokens.mean(1, keepdim=True)
            boxes = (group.reference_boxes + self.boxes(states)).sigmoid()
            outputs.append(DecoderOutput(self.classes(states)[None], boxes[None], states[None], group=group))
        return outputs


def test_one_map_and_no_proposals():
    head = _OneMapHead()
    memory = build_pyramid([torch.randn(2, 16, 4, 6)], [32], [(128, 192), (100, 150)], (128, 192))
    instances = [x["instances"] for x in make_batch(2, 1)]
    for x in instances:
        x.gt_classes %= 3
    samples = PositiveSamples(
        boxes=[torch.tensor([[0.0, 0, 50, 50], [10, 10, 40, 40]])] * 2,
        labels=[torch.tensor([1, 3])] * 2,
        target_boxes=[torch.tensor([[5.0, 5, 60, 60], [0, 0, 0, 0]])] * 2,
        features=[torch.randn(2, 16)] * 2,
    )
    memory = head.encode(memory)
    losses, output = head.losses(memory, {"own": samples}, instances)
    assert set(losses) == {f"loss_{kind}{group}" for kind in ("cls", "box", "giou") for group in ("", "_aux_own")}
    sum(losses.values()).backward()
    assert parameters_without_gradient(head) == []
    # The weight of the positive queries is that of their group.
    head.positive_weight = 1.0
    heavier, _ = head.losses(memory, {"own": samples}, instances)
    assert output.logits.shape == (1, 2, 6, 3)
    for name, value in heavier.items():
        torch.testing.assert_close(value, losses[name] * (2 if "own" in name else 1))
    assert [len(x) for x in head.inference(memory)] == [5, 5]


@every_head
def test_order_of_the_parameters(query_head):
    """An optimizer's saved state goes by the order of the parameters: a run of before must find its own."""
    head = build("MODEL.CODETR.QUERY_HEAD", query_head).query_head
    order = list(dict.fromkeys(name.split(".")[0] for name, _ in head.named_parameters()))
    parts = ["encoder", "decoder", "proposals", "positive_queries"]
    expected = [name for name in parts if getattr(head, name) is not None]
    assert order[: len(expected)] == expected
    assert query_head not in ("CoDeformableDETRHead", "CoDINOHead") or order[4] == "query_content"
