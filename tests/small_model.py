"""A small model, random batches for it, and a step of its training."""

import copy

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from codetr_d2 import add_codetr_config
from codetr_d2.modeling.query_heads import QUERY_HEAD_REGISTRY, SingleLevelQueryHead
from tests.tiny_run import CONFIGS

_BUILT = {}  # models that tests have asked for: a copy takes a tenth of the time of a new one


def build(*options, aux_heads=("roi", "atss")):
    """A small model of its own, with the same initial weights at each call and whatever its auxiliary heads."""
    key = repr((options, aux_heads))
    if key not in _BUILT:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            _BUILT[key] = _build(options, aux_heads)
    return copy.deepcopy(_BUILT[key])


def _build(options, aux_heads):
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "quick_start" / "co_deformable_detr_efficientnet_lite0_digits.yaml"))
    small = ["MODEL.CODETR.EMBED_DIM", 64, "MODEL.CODETR.NUM_QUERIES", 20, "MODEL.ROI_BOX_HEAD.FC_DIM", 32]
    for part in ("ENCODER", "DECODER"):
        small += [f"MODEL.CODETR.{part}.NUM_LAYERS", 2, f"MODEL.CODETR.{part}.FFN_DIM", 64]
    cfg.merge_from_list([*small, "MODEL.WEIGHTS", "", *options])
    if issubclass(QUERY_HEAD_REGISTRY.get(cfg.MODEL.CODETR.QUERY_HEAD), SingleLevelQueryHead):
        cfg.MODEL.CODETR.IN_FEATURES, cfg.MODEL.CODETR.NUM_FEATURE_LEVELS = ["stride16"], 1
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[4 * 2.0**i] for i in range(3, 8)]  # of strides 8 to 128
    cfg.MODEL.CODETR.AUX_HEADS = list(aux_heads)
    return build_model(cfg)


def make_batch(*num_objects: int) -> list[dict]:
    batch = []
    for i, n in enumerate(num_objects):
        height, width = 96 + 16 * i, 128 - 8 * i
        corner = torch.rand(n, 2) * 60
        boxes = Boxes(torch.cat((corner, corner + 10 + torch.rand(n, 2) * 20), dim=1))
        instances = Instances((height, width), gt_boxes=boxes, gt_classes=torch.randint(10, (n,)))
        batch.append({"image": torch.rand(3, height, width) * 255, "instances": instances})
    return batch


def train_step(model, batch) -> dict[str, torch.Tensor]:
    model.train()
    torch.manual_seed(0)
    with EventStorage(0):
        losses = model(batch)
    model.zero_grad()
    sum(losses.values()).backward()
    return losses
