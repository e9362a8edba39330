"""A first config for a dataset and a machine, from their facts alone. docs/your_data.md has its rules."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

__all__ = ["DatasetFacts", "Machine", "Suggestion", "suggest_config", "write_config"]


@dataclass(frozen=True)
class DatasetFacts:
    """What the config depends on, of the images to train on.

    Attributes:
        class_names: by class index.
        image_sizes: [N, 2] (width, height) in pixels.
        box_sizes: [M, 2] (width, height) in pixels of the objects that have an area.
        owners: [M] index of each object's image.
    """

    class_names: list[str]
    image_sizes: np.ndarray
    box_sizes: np.ndarray
    owners: np.ndarray

    @classmethod
    def of_coco(cls, coco: dict, is_chosen: Sequence[bool]) -> "DatasetFacts":
        """The facts of those images of a COCO dict that are chosen."""
        images = [x for x, chosen in zip(coco["images"], is_chosen) if chosen]
        index = {x["id"]: i for i, x in enumerate(images)}
        objects = [x for x in coco["annotations"] if x["image_id"] in index and not x["iscrowd"]]
        objects = [x for x in objects if min(x["bbox"][2:]) > 0]
        return cls(
            [x["name"] for x in coco["categories"]],
            np.array([(x["width"], x["height"]) for x in images], dtype=np.float64).reshape(-1, 2),
            np.array([x["bbox"][2:] for x in objects], dtype=np.float64).reshape(-1, 2),
            np.array([index[x["image_id"]] for x in objects], dtype=np.int64),
        )


@dataclass(frozen=True)
class Machine:
    """What is trained on.

    Attributes:
        device: "cpu" or "cuda".
        memory_gb: memory of the GPU in GiB; means nothing on the CPU.
    """

    device: str
    memory_gb: float = 0.0


@dataclass(frozen=True)
class _Recipe:
    """A config to begin with, and what is known of it.

    Attributes:
        file: below ``configs/``.
        strides: of the levels that the auxiliary heads read.
        num_queries: of the file, as the next three.
        max_detections: ``TEST.DETECTIONS_PER_IMAGE``.
        batch: that belongs to its learning rate.
        short_sides: the least and the largest short side of an image that this chooses.
        target_side: nine of ten objects shall have at least this side (the root of their area), in pixels.
        num_seen: so many images, counted with repetition, are seen in training where that is within ``epochs``.
        epochs: the fewest and the most epochs.
        memory: GiB of training, of the model and of each image of 800 x 1333 pixels.
        seconds: of training, of each image and of a megapixel of it.
        timed_on: what the seconds were measured on.
    """

    file: str
    strides: tuple[int, ...]
    num_queries: int
    max_detections: int
    batch: int
    short_sides: tuple[int, int]
    target_side: int
    num_seen: int
    epochs: tuple[int, int]
    memory: tuple[float, float]
    seconds: tuple[float, float]
    timed_on: str


# Memory: measured in float32 with 20 objects; the small model on a CPU, the others on an NVIDIA H200
# (docs/performance/h200_models.json, h200_train_k.json). Seconds likewise; the CPU's are those of quick starts.
_SMALL = _Recipe(
    file="quick_start/co_deformable_detr_efficientnet_lite0_trees.yaml",
    strides=(8, 16, 32, 64),
    num_queries=100,
    max_detections=100,
    batch=4,
    short_sides=(128, 384),
    target_side=16,
    num_seen=4_000,
    epochs=(5, 200),
    memory=(0.3, 2.0),
    seconds=(0.02, 3.5),
    timed_on="two CPU cores",
)
_SMALL_ON_GPU = replace(_SMALL, num_seen=20_000, timed_on="")  # there is more time
_RESNET = _Recipe(
    file="co_deformable_detr/co_deformable_detr_r50_1x_coco.yaml",
    strides=(8, 16, 32, 64, 128),
    num_queries=300,
    max_detections=100,
    batch=16,
    short_sides=(480, 1024),
    target_side=32,
    num_seen=100_000,
    epochs=(12, 150),
    memory=(0.6, 3.5),
    seconds=(0.0, 0.103),
    timed_on="an NVIDIA H200",
)
_DINO = _Recipe(
    file="co_dino/co_dino_5scale_r50_1x_coco.yaml",
    strides=(4, 8, 16, 32, 64, 128),
    num_queries=900,
    max_detections=300,
    batch=16,
    short_sides=(480, 1024),
    target_side=32,
    num_seen=100_000,
    epochs=(12, 150),
    memory=(0.8, 3.5),
    seconds=(0.0, 0.263),
    timed_on="an NVIDIA H200",
)
_RESNET_FROM_GB, _DINO_FROM_GB = 6.0, 20.0
_USED_SHARE = 0.85  # of a GPU's memory: the rest is CUDA's own and what lies between tensors
_MULTIPLE = 16  # of the sides of images


@dataclass
class Suggestion:
    """A config to start from.

    Attributes:
        base: the config file that it changes, below ``configs/``.
        options: full key of an option -> its value.
        reasons: why, by the key of an option, where there is more to say than the key does.
        time: how long training takes, in words; "" where that was not measured.
        advice: what would make the dataset better for it; "" for nothing.
    """

    base: str
    options: dict[str, object] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    time: str = ""
    advice: str = ""

    def set(self, key: str, value: object, reason: str = "") -> None:
        self.options[key] = value
        if reason:
            self.reasons[key] = reason


def suggest_config(facts: DatasetFacts, machine: Machine) -> Suggestion:
    """A model, sizes of images and anchors, batch and schedule for a dataset and a machine."""
    if machine.device == "cpu":
        recipe = _SMALL
    elif machine.memory_gb < _RESNET_FROM_GB:
        recipe = _SMALL_ON_GPU
    else:
        recipe = _DINO if machine.memory_gb >= _DINO_FROM_GB else _RESNET
    found = Suggestion(recipe.file)
    found.set("MODEL.DEVICE", machine.device)
    found.set("MODEL.CODETR.NUM_CLASSES", len(facts.class_names))
    sides, long_side = _set_image_sizes(found, facts, recipe)
    _set_anchors(found, facts, recipe, sides)
    _set_numbers(found, facts, recipe)
    _set_schedule(
        found, len(facts.image_sizes), machine, recipe, long_side * max(found.options["INPUT.MIN_SIZE_TRAIN"])
    )
    return found


def _set_image_sizes(found: Suggestion, facts: DatasetFacts, recipe: _Recipe) -> tuple[np.ndarray, int]:
    """Set the sizes of images; the sides [M, 2] of objects at the middle size, and the largest side of an image."""
    short, long = facts.image_sizes.min(axis=1), facts.image_sizes.max(axis=1)
    typical = float(np.median(short))
    wanted, reason = recipe.short_sides[1], "there are no objects to go by"
    if len(facts.box_sizes):
        # At a short side of 1; a tenth of the objects is smaller.
        small = float(np.percentile(np.sqrt(facts.box_sizes.prod(axis=1)) / short[facts.owners], 10))
        wanted = float(np.clip(recipe.target_side / small, *recipe.short_sides))
    enlarged = min(wanted, 2 * typical)  # larger ones hold nothing new
    size = max(_rounded(enlarged), _MULTIPLE)
    if len(facts.box_sizes):
        what = f"nine of ten objects have sides of {small * size:.0f} pixels or more"
        reason = f"{what}; the pictures' own is {typical:.0f}"
        # Of this size, tiles show them as large as is wanted.
        tile = int(small * typical * recipe.short_sides[1] / recipe.target_side) // 64 * 64
        if small * size < 0.8 * recipe.target_side and 128 <= tile < 0.8 * typical:
            found.advice = (
                f"{what} at the size that the pictures are trained in, and {small * typical:.0f} at their own. Smaller "
                f"objects are hard to find: --tile {tile} cuts the pictures into tiles."
            )
    aspect = min(float(np.percentile(long / short, 90)), 3.0)
    sizes = sorted({max(_rounded(size * x), _MULTIPLE) for x in (0.8, 0.9, 1.0, 1.1, 1.2)})
    long_side = _rounded(sizes[-1] * aspect, math.ceil)
    found.set("INPUT.MIN_SIZE_TRAIN", sizes)
    found.set("INPUT.MAX_SIZE_TRAIN", long_side)
    found.set("INPUT.MIN_SIZE_TEST", size, reason)
    found.set("INPUT.MAX_SIZE_TEST", _rounded(size * aspect, math.ceil))
    if size < 640:
        found.set("INPUT.CROP.ENABLED", False, "its crops are made for short sides of 640 pixels or more")
    scales = size / short
    return facts.box_sizes * scales[facts.owners][:, None], long_side


def _rounded(value: float, how=round) -> int:
    return how(value / _MULTIPLE) * _MULTIPLE


def _set_anchors(found: Suggestion, facts: DatasetFacts, recipe: _Recipe, sides: np.ndarray) -> None:
    """Set anchors, by one factor of those that were published, so that they fit the objects."""
    if not len(sides):
        return
    factors = sorted((2.0 ** (i / 2) for i in range(-6, 5)), key=lambda x: abs(math.log(x)))
    shares = [_share_that_fits(sides, roi_anchors(recipe.strides, x)) for x in factors]
    # The published ones, or those nearest to them, unless others fit clearly more objects.
    best = next(i for i, share in enumerate(shares) if share >= max(shares) - 0.01)
    factor = factors[best]
    reason = f"{factor:.2g} times the published ones: {100 * shares[best]:.0f}% of the objects overlap one by half"
    if best:
        reason += f", of those {100 * shares[0]:.0f}%"
    sizes = [[round(x, 1) for x in level] for level in roi_anchors(recipe.strides, factor)]
    found.set("MODEL.ANCHOR_GENERATOR.SIZES", sizes, reason)
    for head, published in (("ATSS", 8), ("RETINANET", 4), ("PAA", 8), ("GFL", 8)):
        found.set(f"MODEL.{head}.ANCHOR_SCALE", round(published * factor, 2))


def roi_anchors(strides: Sequence[int], factor: float) -> list[list[float]]:
    """Sides of the region proposal network's anchors, by level: four strides times ``factor``, three in an octave."""
    return [[4 * stride * factor * 2 ** (i / 3) for i in range(3)] for stride in strides]


def _share_that_fits(sides: np.ndarray, anchors: list[list[float]]) -> float:
    """The share of objects that overlap an anchor of the same centre by half (IoU), with ratios of 1/2, 1 and 2."""
    squares = np.array([x for level in anchors for x in level])
    ratios = np.sqrt([0.5, 1.0, 2.0])
    widths, heights = (squares[:, None] / ratios).ravel(), (squares[:, None] * ratios).ravel()
    shared = np.minimum(sides[:, :1], widths) * np.minimum(sides[:, 1:], heights)
    union = sides.prod(axis=1)[:, None] + widths * heights - shared
    return float(((shared / union).max(axis=1) >= 0.5).mean())


def _set_numbers(found: Suggestion, facts: DatasetFacts, recipe: _Recipe) -> None:
    """Set the numbers of queries and detections where an image has more objects than usual."""
    most = int(np.bincount(facts.owners, minlength=1).max()) if len(facts.owners) else 0
    needed = math.ceil(1.5 * most / 50) * 50
    if needed > recipe.num_queries:
        found.set("MODEL.CODETR.NUM_QUERIES", needed, f"an image has up to {most} objects")
    if needed > recipe.max_detections:
        found.set("TEST.DETECTIONS_PER_IMAGE", needed, f"an image has up to {most} objects")


def _set_schedule(found: Suggestion, num_images: int, machine: Machine, recipe: _Recipe, pixels: int) -> None:
    """Set batch and epochs; ``pixels`` are those of the largest image."""
    parts = 1
    if machine.device == "cpu":
        batch = recipe.batch
    else:
        fixed, per_image = recipe.memory
        per_image *= pixels / (800 * 1333)
        fits = max(int((_USED_SHARE * machine.memory_gb - fixed) / per_image), 1)
        batch = next(x for x in (16, 8, 4, 2, 1) if x <= min(fits, recipe.batch))
        if batch < 4:  # too noisy
            batch, parts = 4, 4 // batch
    found.set("SOLVER.IMS_PER_BATCH", batch)
    if parts > 1:
        found.set("SOLVER.ACCUMULATE_STEPS", parts, "what fits into the memory at a time")
    found.set("SOLVER.REFERENCE_BATCH_SIZE", recipe.batch, "BASE_LR is meant for it; training scales it to the batch")
    epochs = int(np.clip(math.ceil(recipe.num_seen / num_images), *recipe.epochs))
    iterations = math.ceil(epochs * num_images / batch)
    if recipe.timed_on:
        each, megapixel = recipe.seconds
        # The middle one of the sizes has two thirds of the largest one's pixels.
        seconds = epochs * num_images * (each + megapixel * pixels * 0.7 / 1e6)
        found.time = f"about {_duration(seconds)} on {recipe.timed_on}"
    about = f", {found.time}" if found.time else ""
    found.set("SOLVER.MAX_EPOCHS", epochs, f"{iterations} iterations{about}")
    found.set("SOLVER.STEPS_EPOCHS", [max(round(0.8 * epochs), 1)])
    period = max(iterations // 10, 20)
    found.set("SOLVER.CHECKPOINT_PERIOD", period)
    found.set("TEST.EVAL_PERIOD", period)


def _duration(seconds: float) -> str:
    minutes = max(round(seconds / 60), 1)
    if minutes < 100:
        return f"{minutes} minutes" if minutes > 1 else "a minute"
    return f"{minutes / 60:.1f} hours" if minutes < 48 * 60 else f"{minutes / 60 / 24:.0f} days"


def write_config(
    file: Path,
    suggestion: Suggestion,
    datasets: dict[str, tuple[Path, Path]],
    output: str,
    weights: str = "",
) -> None:
    """Write a config file, with the reasons as comments.

    Args:
        file: where to; its folder's name is the beginning of the datasets' names.
        suggestion: what to write.
        datasets: by "train", "val" and perhaps "test", the folder of pictures and the COCO json.
        output: ``OUTPUT_DIR``.
        weights: ``MODEL.WEIGHTS``; "": those of the base.
    """
    name = file.absolute().parent.name
    options = dict(suggestion.options)
    if weights:
        options["MODEL.WEIGHTS"] = weights
    options["DATASETS.TRAIN"] = [f"{name}_train"]
    options["DATASETS.TEST"] = [f"{name}_val"]
    options["DATASETS.COCO_JSON"] = [[f"{name}_{x}", str(folder), str(json)] for x, (folder, json) in datasets.items()]
    options["OUTPUT_DIR"] = output
    tree: dict = {}
    for key, value in options.items():
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = (value, suggestion.reasons.get(key, ""))
    lines = [
        "# A first config, made by `codetr_d2 prepare-dataset` from the dataset and the machine: docs/your_data.md.",
        f"_BASE_: {json.dumps(suggestion.base)}",
        *_lines(tree, ""),
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _lines(tree: dict, indent: str) -> list[str]:
    lines = []
    for key, value in tree.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        else:
            value, reason = value
            comment = f" # {reason}" if reason else ""
            lines.append(f"{indent}{key}: {json.dumps(value, ensure_ascii=False)}{comment}")  # JSON is YAML
    return lines
