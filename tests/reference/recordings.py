"""Reads recordings of the published implementation and rebuilds their weights and inputs by the recorded recipe."""

import json
import zlib
from math import ceil
from pathlib import Path

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from codetr_d2 import add_codetr_config
from codetr_d2.checkpoint.published import codetr_to_published, published_to_codetr

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_DIR = Path(__file__).parent / "data"


# The recorded ViT models are smaller than the published ones (the recordings' README, section 9).
SMALL_VIT = [
    *("MODEL.EVA02.EMBED_DIM", 192, "MODEL.EVA02.DEPTH", 4, "MODEL.EVA02.NUM_HEADS", 3),
    *("MODEL.EVA02.WINDOW_SIZE", 4, "MODEL.EVA02.GLOBAL_BLOCKS", [1, 3], "MODEL.EVA02.PRETRAIN_IMAGE_SIZE", 128),
    *("MODEL.CODETR.NUM_CLASSES", 80, "MODEL.CODETR.NUM_QUERIES", 100),
]
SMALL_CANVAS = ["MODEL.EVA02.IMAGE_SIZE", 160, "MODEL.CODETR.CANVAS_SIZE", 160]
# Options in which a recorded case differs from the published config.
OPTIONS_OF_CASES = {
    "co_dino_r50_q100": ["MODEL.CODETR.NUM_QUERIES", 100],
    "co_dino_vit_small": SMALL_VIT,
    "co_dino_vit_small_inst": SMALL_VIT,
    "co_dino_vit_small_lsj": SMALL_VIT + SMALL_CANVAS,
}
# What the recordings leave to chance nowhere, and how the auxiliary heads were tested in all of them.
OPTIONS_OF_RECORDINGS = [
    *("MODEL.SWIN.DROP_PATH_RATE", 0.0, "MODEL.EVA02.DROP_PATH_RATE", 0.0),
    *("MODEL.CODETR.DENOISING.LABEL_NOISE", 0.0, "MODEL.CODETR.DENOISING.BOX_NOISE", 0.0),
    # Everything is sampled.
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 1_000_000, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 1_000_000),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", 1000, "MODEL.RPN.POST_NMS_TOPK_TEST", 1000, "MODEL.RPN.NMS_THRESH_TEST", 0.7),
    *("MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.5, "MODEL.ROI_HEADS.SOFT_NMS", False),
    *("MODEL.ATSS.NMS_THRESH_TEST", 0.6, "MODEL.ATSS.SOFT_NMS", False),
]


def find_cases(folder: Path, kind: str) -> list[str]:
    """Names of the cases of a kind ("forward", "losses") that a folder of recordings holds."""
    return sorted(path.stem for path in (folder / kind).glob("*.*"))


def config_file(name: str) -> Path:
    """Our config of the same name as the published one."""
    [path] = (ROOT / "configs").glob(f"*/{name}.yaml")
    return path


def build_config(meta: dict):
    """The config of a case, ready for the CPU and without weights."""
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.merge_from_file(str(config_file(meta["official_config"])))
    cfg.merge_from_list(OPTIONS_OF_RECORDINGS + OPTIONS_OF_CASES.get(meta["case"], []))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    return cfg


def parameter_shapes(folder: Path, config: str) -> dict[str, list[int]]:
    """Names and shapes of a published model's parameters; those kept here where the folder does not hold them."""
    index = folder / "keys" / "index.json"
    file = json.loads(index.read_text())["config_to_file"][config] if index.exists() else f"{config}.json"
    path = folder / "keys" / file
    shapes = json.loads((path if path.exists() else DEFAULT_DIR / "keys" / file).read_text())
    shapes.pop("_meta")
    return shapes


def draw_parameter(name: str, shape: list[int], salt: str) -> torch.Tensor:
    """The value of one parameter by the recipe of the recordings (its README, section 1)."""
    rng = np.random.default_rng(zlib.crc32((salt + name).encode()))
    u = (rng.random(tuple(shape)) * 2 - 1).astype(np.float32) if shape else np.float32(rng.random() * 2 - 1)
    last = name.split(".")[-1]
    halves = (
        "level_embeds",
        "relative_position_bias_table",
        "pos_embed",
        "query_embed.weight",
        "query_embedding.weight",
    )
    halves += ("label_embedding.weight", "head_pos_embed.weight")
    if last == "num_batches_tracked":
        return torch.tensor(0)
    if last in ("running_mean", "running_var", "scale"):
        value = (0.0 if last == "running_mean" else 1.0) + 0.1 * u
    elif name.endswith(halves):
        value = 0.5 * u
    elif len(shape) == 1 and last == "weight":
        value = 1 + 0.1 * u
    elif len(shape) == 1:
        value = 0.1 * u - (2.5 if last == "bias" and ("cls_branches" in name or "atss_cls" in name) else 0.0)
    else:
        gain = 0.4 if ".reg_branches." in name and shape[0] == 4 else 0.2 if "rpn_reg" in name else 1.0
        value = u * np.float32(gain * np.sqrt(3 / np.prod(shape[1:])))
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def build_recorded_model(folder: Path, meta: dict) -> torch.nn.Module:
    """Our model with the weights of a case; every published key must find its place."""
    model = build_model(build_config(meta))
    own = codetr_to_published(model.state_dict())
    shapes = parameter_shapes(folder, meta["official_config"])
    if meta["case"] in OPTIONS_OF_CASES:  # the names are those of the published model, some shapes are smaller
        assert set(own) <= set(shapes)
        shapes = {name: list(value.shape) for name, value in own.items()}
    kept = {name: value for name, value in own.items() if name.endswith("relative_position_index")}
    weights = {name: draw_parameter(name, shape, meta["weight_salt"]) for name, shape in shapes.items()}
    state_dict, unused = published_to_codetr(weights | kept)
    assert all(name.endswith("num_batches_tracked") for name in unused), unused
    model.load_state_dict(state_dict, strict=True)
    return model


def draw_image(seed: int, height: int, width: int) -> torch.Tensor:
    """[3, H, W] RGB image of 0..255 by the recipe of the recordings (its README, section 2)."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((3, ceil(height / 16), ceil(width / 16)))
    noise = rng.random((3, height, width))
    coarse = coarse.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width]
    return torch.from_numpy(((0.7 * coarse + 0.3 * noise) * 255).astype(np.float32))


def recorded_inputs(meta: dict) -> list[dict]:
    """The batch of a case in detectron2's input format, with the ground truth where it is recorded."""
    batch = []
    for i, (seed, (height, width)) in enumerate(zip(meta["image_seeds"], meta["image_sizes_hw"])):
        batch.append({"image": draw_image(seed, height, width)})
        if "gt" in meta:
            gt = meta["gt"][i]
            batch[-1]["instances"] = Instances(
                (height, width),
                gt_boxes=Boxes(torch.tensor(gt["boxes_xyxy_pixels"]).view(-1, 4)),
                gt_classes=torch.tensor(gt["labels"], dtype=torch.int64),
            )
    return batch


def subsample(array: torch.Tensor, expression: str) -> torch.Tensor:
    """Apply a recorded slice such as "[:, ::5]" to the full array."""
    if expression == "full":
        return array
    index = []
    for part in expression.strip("[]").split(","):
        numbers = [int(x) if x.strip() else None for x in part.split(":")]
        index.append(slice(*numbers) if len(numbers) > 1 else numbers[0])
    return array[tuple(index)]
