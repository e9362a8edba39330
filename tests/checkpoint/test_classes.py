import json

import pytest
import torch
from detectron2.data import MetadataCatalog

from codetr_d2.checkpoint.classes import adapt_classifiers, dataset_classes, match_classes, number_of_classes, rows_of
from codetr_d2.errors import InputError
from codetr_d2.modeling.facts import ClassRows, class_rows
from tests.small_model import build


def test_names_are_matched_whatever_their_spelling():
    wanted = ["Hot Dog", "zebra", "bow_(weapon)", "bow", "bat (animal)", "unknown thing"]
    given = ["person", "hot_dog", "bow_(decorative_ribbons)", "bow_(weapon)", "ZEBRA", "bat_(sports_equipment)"]
    # "bat (animal)" has no full namesake; the short one is the next best.
    assert match_classes(wanted, given) == {0: 1, 1: 4, 2: 3, 3: 2, 4: 5}


def test_builtin_datasets_have_names():
    coco, lvis = dataset_classes("coco_2017_train"), dataset_classes("lvis_v1_train")
    assert len(coco) == 80 and len(lvis) == 1203
    matches = match_classes(coco, lvis)
    assert matches[coco.index("zebra")] == lvis.index("zebra")
    assert len(matches) > 50
    for name in ("no_such_dataset", ""):
        with pytest.raises(InputError, match="REUSE_CLASSES.*coco_2017_train"):
            dataset_classes(name)


def test_names_of_a_dataset_that_is_not_loaded(tmp_path):
    path = tmp_path / "a.json"
    MetadataCatalog.get("classes_own").set(json_file=str(path))
    try:
        path.write_text(json.dumps({"categories": [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}]}))
        assert dataset_classes("classes_own") == ["cat", "dog"]
        for content in ("{}", "[", '{"categories": [{"id": 1}]}'):
            path.write_text(content)
            with pytest.raises(InputError, match="a.json: has no list of categories"):
                dataset_classes("classes_own")
    finally:
        MetadataCatalog.pop("classes_own")


HEADS = ("roi", "atss", "atss", "retinanet")


def rows(co_deformable=False):
    """What a model with every classifier says of them."""
    one = (
        *(f"query_head.decoder.class_embed.{i}" for i in (0, 1)),
        "query_head.denoising.label_embed",
        *(f"auxiliary_heads.{x}.cls_score" for x in ("atss", "atss2")),
        "auxiliary_heads.roi.roi_heads.mask_head.predictor",
        *(f"mask_head.stage_instance_logits.{i}" for i in range(3)),
        "mask_head.iou_head.fc_mask_iou",
    )
    return {
        **{name: ClassRows() for name in one},
        "query_head.proposals.class_embed": ClassRows(are_classes=not co_deformable),
        "auxiliary_heads.roi.roi_heads.box_predictor.cls_score": ClassRows(extra=1),
        "auxiliary_heads.roi.roi_heads.box_predictor.bbox_pred": ClassRows(per_class=4),
        "auxiliary_heads.retinanet.cls_score": ClassRows(repeats=9),
    }


@pytest.mark.slow
@pytest.mark.parametrize("co_deformable", [False, True])
@pytest.mark.parametrize("mask_head", ["roi", "refine"])
def test_models_say_what_their_classifiers_are(co_deformable, mask_head):
    """And of every parameter whose shape depends on the classes."""
    options = ["MODEL.CODETR.QUERY_HEAD", "CoDeformableDETRHead" if co_deformable else "CoDINOHead"]
    options += ["MODEL.MASK_ON", True, "MODEL.CODETR.MASK_HEAD", mask_head, "MODEL.CODETR.NUM_CLASSES"]
    model, other = (build(*options, n, aux_heads=HEADS).state_dict() for n in (7, 11))
    own = class_rows(build(*options, 7, aux_heads=HEADS))
    dependent = {name for name in model if model[name].shape != other[name].shape}
    assert dependent == {name for name in model if rows_of(name, own)}
    for name in dependent:
        layout = rows_of(name, own)
        per_class = layout.per_class * layout.repeats
        assert [len(x[name]) for x in (model, other)] == [per_class * n + layout.extra for n in (7, 11)]
    stated = {name: layout for name, layout in own.items() if any(x.startswith(f"{name}.") for x in model)}
    assert stated.items() <= rows(co_deformable).items()
    assert (number_of_classes(model, own), number_of_classes(other, own)) == (7, 11)


def state_dict(classes, value, agnostic=False):
    """Every classifier of a model; each row holds ``value`` plus the number of its class."""
    numbers = torch.arange(classes, dtype=torch.float32) + value
    values = {
        "query_head.decoder.class_embed.0.bias": numbers,
        "query_head.decoder.class_embed.1.weight": numbers[:, None].expand(-1, 3),
        "query_head.proposals.class_embed.weight": numbers[:, None].expand(-1, 3),
        "query_head.denoising.label_embed.weight": numbers[:, None].expand(-1, 3),
        "auxiliary_heads.atss.cls_score.weight": numbers[:, None, None, None].expand(-1, 3, 3, 3),
        "auxiliary_heads.atss2.cls_score.bias": numbers,
        "auxiliary_heads.roi.roi_heads.box_predictor.cls_score.bias": torch.cat((numbers, torch.tensor([value - 1.0]))),
        "auxiliary_heads.roi.roi_heads.box_predictor.bbox_pred.bias": numbers.repeat_interleave(4),
        "auxiliary_heads.roi.roi_heads.mask_head.predictor.bias": numbers,
        "auxiliary_heads.retinanet.cls_score.bias": numbers.repeat(9),
        "mask_head.stage_instance_logits.2.bias": numbers,
        "mask_head.iou_head.fc_mask_iou.bias": numbers,
    }
    if agnostic:
        values["auxiliary_heads.roi.roi_heads.box_predictor.bbox_pred.bias"] = torch.full((4,), value)
        values["mask_head.stage_instance_logits.2.bias"] = torch.full((1,), value)
    values["mask_head.stage_instance_logits.3.bias"] = torch.full((1,), value)
    values["query_head.proposals.proj.bias"] = torch.full((classes,), value)
    return {name: row.clone() for name, row in values.items()}


SHARED = {"mask_head.stage_instance_logits.3.bias", "query_head.proposals.proj.bias"}


def test_number_of_classes():
    assert number_of_classes(state_dict(5, 0.0), rows()) == 5
    name = "auxiliary_heads.roi.roi_heads.box_predictor.cls_score.bias"
    assert number_of_classes({name: torch.zeros(6)}, rows()) == 5
    assert number_of_classes({"backbone.weight": torch.zeros(1)}, rows()) is None
    assert number_of_classes(state_dict(5, 0.0), {}) is None


def test_without_matches_all_classifiers_start_anew():
    weights, own = state_dict(5, 100.0), state_dict(3, 0.0)
    result, anew = adapt_classifiers(weights, own, rows(), None)
    assert result.keys() == SHARED and anew == own.keys() - SHARED
    assert all(torch.equal(result[name], weights[name]) for name in SHARED)


@pytest.mark.parametrize("classes", [3, 5])
def test_matching_rows_are_taken_over(classes):
    weights, own = state_dict(5, 100.0), state_dict(classes, 0.0)
    result, anew = adapt_classifiers(weights, own, rows(), {0: 4, 2: 1})
    assert not anew and result.keys() == own.keys()
    expected = torch.arange(classes, dtype=torch.float32)
    expected[0], expected[2] = 104, 101
    for name in own.keys() - SHARED:
        value = result[name].flatten(1)[:, 0] if result[name].dim() > 1 else result[name]
        if name.endswith("bbox_pred.bias"):
            value = value.view(-1, 4)
            assert (value == value[:, :1]).all()
            value = value[:, 0]
        if "retinanet" in name:
            value = value.view(9, -1)
            assert (value == value[:1]).all()
            value = value[0]
        if name.endswith("box_predictor.cls_score.bias"):
            assert value[-1] == 99  # background
            value = value[:-1]
        assert torch.equal(value, expected), name
    # The model's own values stay what they are.
    assert own["query_head.decoder.class_embed.0.bias"][0] == 0


def test_objectness_of_co_deformable_detr_stays_in_its_row():
    weights, own = state_dict(5, 100.0), state_dict(3, 0.0)
    name = "query_head.proposals.class_embed.weight"
    for matches in (None, {0: 4, 2: 1}):
        result, anew = adapt_classifiers(weights, own, rows(co_deformable=True), matches)
        assert name not in anew and torch.equal(result[name][:, 0], torch.tensor([100.0, 101.0, 102.0]))
    result, _ = adapt_classifiers(own, weights, rows(co_deformable=True), None)
    assert torch.equal(result[name][:, 0], torch.tensor([0.0, 1.0, 2.0, 103.0, 104.0]))


def test_what_all_classes_share_is_taken_over():
    weights, own = state_dict(5, 100.0, agnostic=True), state_dict(3, 0.0, agnostic=True)
    result, anew = adapt_classifiers(weights, own, rows(), None)
    for name in (
        "auxiliary_heads.roi.roi_heads.box_predictor.bbox_pred.bias",
        "mask_head.stage_instance_logits.2.bias",
    ):
        assert name not in anew and torch.equal(result[name], weights[name])
