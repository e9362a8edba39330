#!/usr/bin/env python
"""Build the model of every config, compare its parameters with what they should be, and print a table.

    python tools/check_configs.py                             # all of configs/
    python tools/check_configs.py --step 'configs/co_dino/*'  # and train each for one step on a small random image

No dataset and no weights are needed. Building takes no memory; a step of the largest model takes about 6 GB.
"""

import argparse
import functools
import glob
import json
import math
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

from codetr_d2.engine import load_config
from codetr_d2.engine.optimizer import build_optimizer, clip_full_model
from codetr_d2.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
# Those of the published models; of ablations worked out by hand, from theirs and the shapes of the heads.
COUNTS = json.loads((ROOT / "tests" / "configs" / "parameter_counts.json").read_text())

# Starts of our names and the published modules that they belong to; the first that fits counts.
MODULES = {
    **{f"backbone.p{level}.": "neck" for level in range(2, 7)},  # the feature pyramid of the ViT
    "backbone.": "backbone",
    "neck.": "neck",
    "query_head.": "query_head",
    "auxiliary_level.": "query_head",
    "auxiliary_heads.roi.proposal_generator.": "rpn_head",
    "auxiliary_heads.roi.roi_heads.": "roi_head",
    "auxiliary_heads.atss": "bbox_head",  # several of them too
    **{f"auxiliary_heads.{name}.": f"{name}_head" for name in ("retinanet", "fcos", "paa", "gfl")},
    "mask_head.iou_head.": "mask_iou_head",
    "mask_head.": "mask_head",
}
SIZE = 256  # side of the largest image of a step, in pixels


def build_without_weights(cfg: CfgNode) -> nn.Module:
    """The model of a config with weights that have shapes and no values, in no time and memory."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    # detectron2's Swin reads the rates of its stochastic depth back from a linspace, which needs values.
    with torch.device("meta"), mock.patch("torch.linspace", functools.partial(torch.linspace, device="cpu")):
        return build_model(cfg)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Number of parameters of each top-level module, by the published models' names.

    The weights and biases of frozen batch normalisation are buffers in detectron2, and parameters there.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d):
            sizes[f"{name}.weight"], sizes[f"{name}.bias"] = module.weight.numel(), module.bias.numel()
    counts: dict[str, int] = {}
    for name, size in sizes.items():
        module = next(module for start, module in MODULES.items() if name.startswith(start))
        counts[module] = counts.get(module, 0) + size
    return counts


def small_sample(cfg: CfgNode) -> dict:
    """A random image with two objects, as the dataset mapper would give it."""
    generator = torch.Generator().manual_seed(0)
    height, width = SIZE - 64, SIZE
    boxes = Boxes(torch.tensor([[20.0, 30.0, 110.0, 150.0], [100.0, 60.0, 230.0, 180.0]]))
    instances = Instances(
        (height, width), gt_boxes=boxes, gt_classes=torch.tensor([0, cfg.MODEL.CODETR.NUM_CLASSES - 1])
    )
    if cfg.MODEL.MASK_ON:
        corners = [[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes.tensor.tolist()]
        masks = PolygonMasks(corners)
        if cfg.INPUT.MASK_FORMAT == "bitmask":
            masks = BitMasks.from_polygon_masks(masks, height, width)
        instances.gt_masks = masks
    image = torch.rand(3, height, width, generator=generator) * 255
    return {"image": image, "instances": instances, "height": height, "width": width}


def training_step(cfg: CfgNode) -> dict[str, float]:
    """Train the model of a config for one step on the CPU, from random weights and with images made small.

    Returns:
        The losses.

    Raises:
        FloatingPointError: a loss, a gradient or a weight is not finite, or a parameter has no gradient.
    """
    cfg = cfg.clone()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    for section, key in ((cfg.MODEL.CODETR, "CANVAS_SIZE"), (cfg.MODEL.EVA02, "IMAGE_SIZE")):
        section[key] = min(section[key], SIZE)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    with EventStorage():
        losses = model([small_sample(cfg)])
    sum(losses.values()).backward()
    norm = clip_full_model(optimizer, cfg)
    optimizer.step()
    values = {**{name: loss.item() for name, loss in losses.items()}, "the gradient's norm": norm.item()}
    faulty = [name for name, value in values.items() if not math.isfinite(value)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not parameter.isfinite().all()):
            faulty.append(name)
    if faulty:
        raise FloatingPointError(f"not finite, or without a gradient: {', '.join(faulty)}")
    del values["the gradient's norm"]
    return values


def check(path: str, with_step: bool) -> tuple[dict[str, str], bool]:
    """A row of the table, and whether all is well."""
    cfg = load_config(path)
    name = Path(path).stem
    counts, expected = count_parameters(build_without_weights(cfg)), COUNTS.get(name)
    differing = {
        f"{module} {counts.get(module, 0)} instead of {(expected or {}).get(module, 0)}"
        for module in {*counts, *(expected or counts)}
        if counts.get(module) != (expected or counts).get(module)
    }
    row = {
        "config": name,
        "parameters": f"{sum(counts.values()):,}",
        "expected": "-" if expected is None else ", ".join(sorted(differing)) or "equal in every module",
    }
    if with_step:
        start = time.perf_counter()
        try:
            losses = training_step(cfg)
            row["step"] = f"{len(losses)} finite losses, {sum(losses.values()):.1f} in all"
        except Exception as error:  # whatever it is, the other configs are to be seen too
            differing.add(str(error))
            row["step"] = f"{type(error).__name__}: {error}"
        row["seconds"] = f"{time.perf_counter() - start:.0f}"
    return row, not differing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", help="files or patterns (default: every config of configs/)")
    parser.add_argument("--step", action="store_true", help="train each for one step on the CPU")
    args = parser.parse_args()
    patterns = args.configs or [str(ROOT / "configs" / "[!_]*" / "*.yaml")]
    paths = sorted(path for pattern in patterns for path in glob.glob(pattern))
    if not paths:
        sys.exit(f"error: no config fits {' '.join(patterns)}")
    rows, good = [], []
    for path in paths:
        print(path, file=sys.stderr)
        try:
            row, is_good = check(path, args.step)
        except InputError as error:
            sys.exit(f"error: {error}")
        rows.append(row)
        good.append(is_good)
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
    sys.exit(0 if all(good) else f"error: {good.count(False)} of {len(good)} configs are not as they should be")


if __name__ == "__main__":
    main()
