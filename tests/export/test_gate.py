"""Comparing detections: what is alike, what is missed."""

from unittest import mock

import pytest
import torch
from detectron2.structures import Boxes, Instances

from codetr_d2.export.gate import compare_detections, compare_on_pictures
from tests.exported_model import lively
from tests.small_model import build


def detections(boxes, scores, classes, masks=None):
    result = Instances((50, 60), pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)))
    result.scores, result.pred_classes = torch.tensor(scores), torch.tensor(classes)
    if masks is not None:
        result.pred_masks = masks
    return result


BOXES = [[0, 0, 10, 10], [5, 5, 30, 40], [20, 0, 40, 9]]


def test_the_same_in_another_order_is_alike():
    one = detections(BOXES, [0.9, 0.5, 0.1], [0, 1, 1])
    moved = [[x + 0.25 for x in BOXES[1]], BOXES[0], BOXES[2]]
    difference = compare_detections(one, detections(moved, [0.5, 0.8995, 0.1], [1, 0, 1]))
    assert difference.missing == 0 and difference.box == 0.25 and difference.score == pytest.approx(0.0005, abs=1e-6)
    assert difference.number == 6
    assert difference.mask is None


@pytest.mark.parametrize(
    "changed",
    [
        ([[0, 0, 10, 10.6], *BOXES[1:]], [0.9, 0.5, 0.1], [0, 1, 1]),
        (BOXES, [0.9, 0.502, 0.1], [0, 1, 1]),
        (BOXES, [0.9, 0.5, 0.1], [0, 2, 1]),
    ],
    ids=["box", "score", "class"],
)
def test_what_has_no_like_is_missed_in_both(changed):
    assert compare_detections(detections(BOXES, [0.9, 0.5, 0.1], [0, 1, 1]), detections(*changed)).missing == 2


def test_a_detection_more_is_missed_and_the_last_one_is_not():
    one, two = detections(BOXES[:2], [0.9, 0.5], [0, 1]), detections(BOXES, [0.9, 0.5, 0.1], [0, 1, 1])
    assert compare_detections(one, two).missing == 0  # the third one is the last of many
    more = detections([*BOXES, [1, 1, 2, 2]], [0.9, 0.5, 0.1, 0.05], [0, 1, 1, 1])
    assert compare_detections(one, more).missing == 1
    nothing = one[torch.zeros(2, dtype=torch.bool)]
    assert compare_detections(nothing, two).missing == 2
    assert compare_detections(nothing, nothing).number == 0


def test_masks_differ_by_their_share_of_pixels():
    masks = torch.zeros(2, 50, 60, dtype=torch.bool)
    masks[:, :10, :10] = True
    others = masks.clone()
    others[1, 0, :5] = False
    one, other = (detections(BOXES[:2], [0.9, 0.5], [0, 1], x) for x in (masks, others))
    assert compare_detections(one, other).mask == pytest.approx(5 / 100)


def test_pictures_in_which_nothing_is_found_show_nothing():
    nothing = detections(BOXES, [0.9, 0.5, 0.1], [0, 1, 1])[torch.zeros(3, dtype=torch.bool)]

    def detector(inputs):
        return [{"instances": nothing} for _ in inputs]

    assert "nothing was detected in any picture" in compare_on_pictures(detector, detector, [[torch.zeros(3, 9, 9)]])[0]


def test_a_batch_that_differs_is_named(capsys):
    class Detector(torch.nn.Module):
        def __init__(self, score):
            super().__init__()
            self.score = score

        def forward(self, inputs):
            shift = self.score if inputs[0]["image"].shape[-1] > 30 else 0.5
            return [{"instances": detections(BOXES, [0.9, shift, 0.1], [0, 1, 1])} for _ in inputs]

    batches = [[torch.zeros(3, 20, 30)], [torch.zeros(3, 20, 40), torch.zeros(3, 25, 30)]]
    problems = compare_on_pictures(Detector(0.5), Detector(0.6), batches)
    assert len(problems) == 1 and "40 x 20 and 30 x 25" in problems[0] and "4 without their like" in problems[0]
    assert "30 x 20: 6 detections, 0 without" in capsys.readouterr().out


@torch.no_grad()
@pytest.mark.parametrize("is_best", [True, False])
def test_proposals_may_be_others_of_the_same_score(is_best):
    """The model is asked for the queries that the file has chosen, and its scores whether they are as good."""
    model = lively(build("MODEL.CODETR.QUERY_HEAD", "CoDINOHead", "MODEL.CODETR.NUM_QUERIES", 5, aux_heads=()))
    head, picture = model.query_head, torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0)) * 255
    memory = model.encode(model.features(model.preprocess([{"image": picture}])))
    scores = head.proposal_scores(head.proposals(memory))
    chosen = (scores if is_best else -scores).topk(5).indices

    class Exported(torch.nn.Module):
        proposals = chosen.numpy()

        def forward(self, inputs):
            with mock.patch.object(head, "best_proposals", lambda _: chosen):
                return model(inputs)

    problems = compare_on_pictures(model, Exported(), [[picture]])
    if is_best:
        assert problems == []
    else:
        assert ", 0 without their like" in problems[0] and "5 proposals were chosen otherwise" in problems[0]
    assert torch.equal(head.best_proposals(head.proposals(memory)), scores.topk(5).indices)
