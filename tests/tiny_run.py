"""The output folder of a training run, of a model that is as small as it can be and has learnt nothing."""

from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from codetr_d2 import add_codetr_config

CONFIGS = Path(__file__).parents[1] / "configs"


def write_tiny_run(folder: Path, datasets: list[list[str]] | None = None, opts: tuple = ()) -> CfgNode:
    """Write config.yaml and model_final.pth into ``folder``.

    ``datasets``: COCO_JSON entries for training and test. ``opts``: key, value, ... of the config.
    """
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "quick_start" / "co_deformable_detr_efficientnet_lite0_digits.yaml"))
    cfg.MODEL.CODETR.EMBED_DIM = 32
    cfg.MODEL.CODETR.NUM_QUERIES = 20
    for part in (cfg.MODEL.CODETR.ENCODER, cfg.MODEL.CODETR.DECODER):
        part.NUM_LAYERS, part.FFN_DIM, part.NUM_HEADS = 1, 32, 4
    cfg.MODEL.CODETR.AUX_HEADS = []
    cfg.MODEL.CODETR.CLASS_NAMES = [str(digit) for digit in range(10)]
    if datasets is not None:
        cfg.DATASETS.COCO_JSON = datasets
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (datasets[0][0],), (datasets[1][0],)
    cfg.merge_from_list(list(opts))
    torch.manual_seed(0)
    model = build_model(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "iteration": 9}, folder / "model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return cfg
