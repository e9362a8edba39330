"""An auxiliary head that the package does not know: it is registered, and all the rest follows from what it states."""

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from codetr_d2.checkpoint.checkpointer import CoDETRCheckpointer
from codetr_d2.checkpoint.convert import checkpoint_to_codetr, checkpoint_to_published
from codetr_d2.engine import CoDETRTrainer, check_config, evaluate, load_config, setup
from codetr_d2.errors import InputError
from codetr_d2.layers import focal_loss
from codetr_d2.modeling.auxiliary import AUX_HEAD_REGISTRY, AuxiliaryHead
from codetr_d2.modeling.facts import ClassRows
from codetr_d2.modeling.structures import PositiveSamples
from codetr_d2.option_checks import positive
from tests.tiny_detector import NUM_CLASSES

CONFIG = Path(__file__).parents[1] / "configs" / "co_deformable_detr" / "co_deformable_detr_r50_1x_coco.yaml"


class CentreHead(AuxiliaryHead):
    """Classifies every token; an object's is the one at its centre on the finest level. Its boxes are the cells."""

    PUBLISHED_NAMES = [("centre_head.classifier.{rest}", "score.{rest}")]

    def __init__(self, cfg, input_shapes):
        super().__init__()
        self.num_classes = cfg.MODEL.CODETR.NUM_CLASSES
        self.weight = cfg.MODEL.CENTRE.WEIGHT
        self.score = nn.Linear(input_shapes[0].channels, self.num_classes)

    @classmethod
    def check_options(cls, cfg):
        positive(cfg, "MODEL.CENTRE.WEIGHT")

    def class_rows(self):
        return {"score": ClassRows()}

    def cells(self, geometry):
        boxes = []
        for (height, width), stride in zip(geometry.shapes, geometry.strides):
            y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            corner = torch.stack((x, y), dim=-1).flatten(0, 1).float() * stride
            boxes.append(torch.cat((corner, corner + stride), dim=1))
        return torch.cat(boxes)

    def forward(self, pyramid, targets):
        geometry, logits = pyramid.geometry, self.score(pyramid.tokens).float()
        cells = self.cells(geometry)
        labels = torch.full(logits.shape[:2], self.num_classes)
        boxes = torch.zeros(*logits.shape[:2], 4)
        for i, x in enumerate(targets):
            columns, rows = (x.gt_boxes.get_centers() / geometry.strides[0]).long().unbind(1)
            index = rows * geometry.shapes[0][1] + columns
            labels[i, index], boxes[i, index] = x.gt_classes, x.gt_boxes.tensor
        losses = {"loss_cls": focal_loss(logits, labels).sum() * self.weight}
        return losses, PositiveSamples([cells] * len(targets), list(labels), list(boxes), list(pyramid.tokens))

    def inference(self, pyramid):
        results, cells = [], self.cells(pyramid.geometry)
        for size, scores in zip(pyramid.geometry.image_sizes, self.score(pyramid.tokens).sigmoid()):
            top, index = scores.flatten().topk(5)
            boxes = Boxes(cells[index // self.num_classes])
            boxes.clip(size)
            fields = {"pred_boxes": boxes, "scores": top, "pred_classes": index % self.num_classes}
            results.append(Instances(size, **fields))
        return results


@pytest.fixture
def register():
    """A function that registers a head as "centre", until the end of the test."""
    yield AUX_HEAD_REGISTRY.register("centre")
    del AUX_HEAD_REGISTRY._obj_map["centre"]


@pytest.fixture
def make_config(coco_json, tmp_path, register):
    """A function (KEY, VALUE, ...) -> config of a small detector with the head."""
    register(CentreHead)

    def make(*opts, weight=1.0):
        small = {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64, "MODEL.CODETR.EMBED_DIM": 32}
        for part in ("MODEL.CODETR.ENCODER", "MODEL.CODETR.DECODER"):
            small |= {f"{part}.NUM_LAYERS": 1, f"{part}.NUM_HEADS": 4, f"{part}.FFN_DIM": 16}
        options = {
            **small,
            **{"MODEL.DEVICE": "cpu", "MODEL.WEIGHTS": "", "MODEL.ROI_BOX_HEAD.FC_DIM": 16},
            **{"MODEL.CODETR.AUX_HEADS": ["centre", "roi"], "MODEL.CODETR.EVAL_HEAD": "centre"},
            **{"MODEL.CODETR.NUM_CLASSES": NUM_CLASSES, "MODEL.CODETR.NUM_QUERIES": 20},
            **{"INPUT.MIN_SIZE_TRAIN": (64,), "INPUT.MIN_SIZE_TEST": 64, "DATALOADER.NUM_WORKERS": 0},
            **{"DATASETS.COCO_JSON": coco_json, "DATASETS.TRAIN": ("tiny_train",), "DATASETS.TEST": ("tiny_test",)},
            **{"SOLVER.IMS_PER_BATCH": 2, "SOLVER.MAX_ITER": 2, "SOLVER.MAX_EPOCHS": 0, "SOLVER.STEPS": ()},
            **{"SOLVER.CHECKPOINT_PERIOD": 1, "SEED": 1, "OUTPUT_DIR": str(tmp_path / "run")},
        }
        pairs = [str(x) for pair in options.items() for x in pair]
        cfg = load_config(str(CONFIG), [*pairs, *map(str, opts)])
        cfg.MODEL.CENTRE = CfgNode({"WEIGHT": weight})
        (tmp_path / "run").mkdir(exist_ok=True)
        return cfg

    return make


def test_its_options_are_checked(make_config):
    check_config(make_config())
    with pytest.raises(InputError, match=r"MODEL\.CENTRE\.WEIGHT is 0\.0; it must be greater than 0"):
        check_config(make_config(weight=0.0))
    check_config(make_config("MODEL.CODETR.AUX_HEADS", "['roi']", "MODEL.CODETR.EVAL_HEAD", "roi", weight=0.0))


def test_it_trains_resumes_and_is_evaluated(make_config, tmp_path):
    def train(cfg, resume):
        trainer = CoDETRTrainer(setup(cfg))
        trainer.resume_or_load(resume)
        return trainer, trainer.train()

    trainer, results = train(make_config(), False)
    state = trainer.bare_model.state_dict()
    assert trainer.start_iter == 0 and "AP" in results["bbox"]
    assert trainer.bare_model.auxiliary_heads["centre"].score.weight.grad.abs().sum() > 0

    (tmp_path / "run" / "last_checkpoint").write_text("model_0000000.pth")
    trainer, _ = train(make_config(), True)
    assert trainer.start_iter == 1
    for name, value in trainer.bare_model.state_dict().items():
        assert torch.equal(value, state[name]), name

    weights = tmp_path / "run" / "model_final.pth"
    again = evaluate(setup(make_config("MODEL.WEIGHTS", weights), eval_only=True))
    assert again["bbox"] == pytest.approx(results["bbox"], nan_ok=True)
    model = trainer.bare_model.eval()
    [found] = model([{"image": torch.rand(3, 64, 96) * 255}])
    assert 0 < len(found["instances"]) <= 5  # as many as this head finds


def test_its_classifier_takes_other_classes(make_config, tmp_path):
    source = build_model(make_config())
    path = tmp_path / "weights.pth"
    torch.save({"model": source.state_dict()}, path)
    model = build_model(make_config("MODEL.CODETR.NUM_CLASSES", 4))
    fresh = model.auxiliary_heads["centre"].score.weight.clone()
    with pytest.raises(InputError, match="has 3 classes, but MODEL.CODETR.NUM_CLASSES is 4"):
        CoDETRCheckpointer(model).load(str(path))

    CoDETRCheckpointer(model, fine_tune=True).load(str(path))
    assert torch.equal(model.auxiliary_heads["centre"].score.weight, fresh)
    assert torch.equal(model.query_head.query_content.weight, source.query_head.query_content.weight)

    MetadataCatalog.get("outside_letters").thing_classes = ["a", "b", "c"]
    try:
        options = {"class_names": ["b", "x", "c", "y"], "reuse_classes": "outside_letters"}
        CoDETRCheckpointer(model, fine_tune=True, **options).load(str(path))
    finally:
        MetadataCatalog.pop("outside_letters")
    taken, given = model.auxiliary_heads["centre"].score.weight, source.auxiliary_heads["centre"].score.weight
    assert torch.equal(taken, torch.stack((given[1], fresh[1], given[2], fresh[3])))


def test_its_names_are_published(make_config):
    ours = build_model(make_config()).state_dict()
    published = checkpoint_to_published({"model": ours})
    weights = published["state_dict"]
    assert weights["centre_head.classifier.weight"] is ours["auxiliary_heads.centre.score.weight"]
    # The published order begins with roi, though the model's does not.
    for k, head in enumerate(("roi", "centre")):
        name = f"query_head.transformer.aux_pos_trans.{k}.weight"
        assert weights[name] is ours[f"query_head.positive_queries.{head}.box_proj.weight"]
    back = checkpoint_to_codetr(published)[0]["model"]
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_a_function_that_states_nothing_is_a_head_too(make_config):
    AUX_HEAD_REGISTRY._obj_map.pop("centre")

    @AUX_HEAD_REGISTRY.register()
    def centre(cfg, input_shapes):
        head = nn.Linear(2, 2)
        head.num_classes = cfg.MODEL.CODETR.NUM_CLASSES
        return head

    cfg = make_config(weight=0.0)
    check_config(cfg)
    with pytest.raises(InputError, match="auxiliary_heads.centre.weight has no published name"):
        checkpoint_to_published({"model": build_model(cfg).state_dict()})
