"""One training step: losses, matchings, positives and gradients equal those of the published implementation."""

import re

import pytest
import torch

from codetr_d2.checkpoint.published import published_to_codetr
from codetr_d2.modeling.auxiliary.anchors import valid_anchors

pytestmark = pytest.mark.slow  # seconds for each recording

LOSSES = 1e-4  # relative
GRADIENTS = 1e-3  # relative
AUXILIARY = {"loss_rpn_cls": "loss_rpn_cls_roi", "loss_rpn_bbox": "loss_rpn_box_roi"}
AUXILIARY |= {"loss_cls0": "loss_cls_roi", "loss_bbox0": "loss_box_roi"}
AUXILIARY |= {"loss_cls1": "loss_cls_atss", "loss_bbox1": "loss_box_atss", "loss_centerness1": "loss_centerness_atss"}


def our_name(name: str) -> str:
    """The published name of a loss -> ours."""
    if name in AUXILIARY:
        return AUXILIARY[name]
    layer, set_, kind, head = re.fullmatch(r"(?:d(\d+)\.)?(enc_|dn_)?loss_(cls|bbox|iou)(?:_aux(\d))?", name).groups()
    kind = {"cls": "loss_cls", "bbox": "loss_box", "iou": "loss_giou"}[kind]
    group = f"_{set_[:-1]}" if set_ else f"_aux_{('roi', 'atss')[int(head)]}" if head else ""
    return kind + group + (f"_{layer}" if layer else "")


def ground_truth(recorded: dict, image: int) -> torch.Tensor:
    """[G, 4] boxes of an image, xyxy pixels."""
    return torch.tensor(recorded["meta"]["gt"][image]["boxes_xyxy_pixels"]).view(-1, 4)


def test_losses(training):
    recorded, ours = training
    expected = {our_name(k): v for k, v in recorded["losses"].items() if "loss" in k}
    assert set(ours.losses) == set(expected)
    problems = []
    for name, values in expected.items():
        value = sum(values) if isinstance(values, list) else values
        if ours.losses[name].item() != pytest.approx(value, rel=LOSSES, abs=1e-7):
            problems.append(f"{name}: {ours.losses[name].item()}, not {value}")
    assert not problems, problems
    assert sum(ours.losses.values()).item() == pytest.approx(recorded["total"], rel=LOSSES)


def test_matchings(training):
    """Hungarian matching of every decoder layer and of the encoder's proposals."""
    recorded, ours = training

    def pairs(match):
        """[B, G] query of each ground truth -> the recorded [[query, ground truth], ...] of each image."""
        return [sorted([int(q), g] for g, q in enumerate(row) if q >= 0) for row in match]

    decoder, encoder = ours.matches
    assert [pairs(layer) for layer in decoder] == recorded["hungarian"]["per_layer"]
    assert pairs(encoder[0]) == recorded["hungarian"]["encoder"]


def test_positive_queries(training):
    """Coordinates, labels and targets of the queries that the auxiliary heads hand to the decoder."""
    recorded, ours = training
    num_classes = ours.model.query_head.criterion.num_classes
    for expected in recorded["aux_queries"]:
        group = ours.groups[f"_aux_{expected['head']}"]
        assert group.num_queries == expected["num_queries"]
        positive = group.labels != num_classes
        assert positive.sum(1).tolist() == expected["num_positive_per_image"]
        assert group.labels.tolist() == expected["labels"]
        torch.testing.assert_close(group.reference_boxes, torch.tensor(expected["coords_cxcywh"]), rtol=0, atol=1e-5)
        for i, targets in enumerate(expected["targets_cxcywh_positive_only"]):
            torch.testing.assert_close(group.target_boxes[i][positive[i]], torch.tensor(targets), rtol=0, atol=1e-5)


def test_positives_of_the_auxiliary_heads(training):
    """Anchors and proposals that the auxiliary heads assign, by index."""
    recorded, ours = training
    expected = recorded["intermediate"]
    model = ours.model
    if "rpn_positive_anchors_per_image" in expected:
        anchors, labels, boxes = ours.rpn
        assert [(x == 1).sum().item() for x in labels] == expected["rpn_positive_anchors_per_image"]
        assert [(x == 0).sum().item() for x in labels] == expected["rpn_negative_anchors_per_image"]
        for i, pairs in enumerate(expected["rpn_assigned"]):
            strides = model.auxiliary_heads["roi"].proposal_generator.anchor_generator.strides
            valid = torch.cat(valid_anchors(anchors, strides, recorded["meta"]["image_sizes_hw"][i]))
            assert torch.nonzero(labels[i][valid] == 1).flatten().tolist() == [anchor for anchor, _ in pairs]
            gt = ground_truth(recorded, i)
            assert torch.equal(boxes[i][labels[i] == 1], gt[[g for _, g in pairs]])
        assert [len(x) for x in ours.proposals] == expected["num_proposals_per_image"]
    if "roi_positive_per_image" in expected:
        samples = ours.samples["roi"]
        num_classes = model.query_head.criterion.num_classes
        for i, (labels, boxes) in enumerate(zip(samples.labels, samples.boxes)):
            positive = labels != num_classes
            assert positive.sum().item() == expected["roi_positive_per_image"][i]
            assert (~positive).sum().item() == expected["roi_negative_per_image"][i]
            torch.testing.assert_close(
                boxes[positive], torch.tensor(expected["roi_positive_boxes"][i]), rtol=0, atol=1e-2
            )
            gt = ground_truth(recorded, i)
            torch.testing.assert_close(samples.target_boxes[i][positive], gt[expected["roi_positive_gt_index"][i]])
    if "atss_positive_per_image" in expected:
        samples = ours.samples["atss"]
        head = model.auxiliary_heads["atss"]
        for i, labels in enumerate(samples.labels):
            inside = samples.boxes[i].abs().sum(1) > 0  # anchors outside the valid area are all zero
            assigned = torch.nonzero(labels[inside] != head.num_classes).flatten().tolist()
            assert assigned == [anchor for anchor, _ in expected["atss_assigned_inside_valid"][i]]
            gt = ground_truth(recorded, i)
            targets = samples.target_boxes[i][inside][assigned]
            assert torch.equal(targets, gt[[g for _, g in expected["atss_assigned_inside_valid"][i]]])


def test_gradients(training):
    recorded, ours = training
    gradients = {name: p.grad for name, p in ours.model.named_parameters() if p.requires_grad}
    missing = [name for name, grad in gradients.items() if grad is None]
    assert not missing
    problems = []
    for published, expected in recorded["grad_norms"].items():
        if published.endswith("head_pos_embed.weight"):
            parts = [g for name, g in gradients.items() if name.endswith("head_embed")]
        else:
            num_branches = {f"query_head.cls_branches.{i}.x": torch.tensor(0) for i in range(7)}
            names, _ = published_to_codetr({published: torch.tensor(0.0), **num_branches})
            parts = [gradients[name] for name in names if name in gradients and not name.endswith(".x")]
        norm = torch.stack([part.norm() for part in parts]).norm().item()
        if norm != pytest.approx(expected, rel=GRADIENTS):
            problems.append(f"{published}: {norm}, not {expected}")
    assert not problems, problems
    total = torch.stack([grad.norm() for grad in gradients.values()]).norm().item()
    assert total == pytest.approx(recorded["grad_norm_all_parameters"], rel=GRADIENTS)
