"""Models to analyse, and pictures with their ground truth for them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from detectron2.config import CfgNode
from detectron2.data import MapDataset
from detectron2.modeling import build_model
from torch import nn

from ..checkpoint.checkpointer import CoDETRCheckpointer
from ..config.config_file import load_config, resolve_device
from ..data import CoDETRDatasetMapper, build_augmentations, load_datasets, register_datasets
from ..data.datasets import annotated_images
from ..errors import InputError

__all__ = ["AnalysedModel", "ModelSpec", "check_names", "images", "load_model", "load_models"]


@dataclass(frozen=True)
class ModelSpec:
    """What the command line says of a model.

    Attributes:
        name: what pictures and tables call it.
        config_file: its config.
        weights: a file of weights; "" for ``MODEL.WEIGHTS`` of the config.
    """

    name: str
    config_file: str
    weights: str = ""

    @classmethod
    def parse(cls, text: str) -> "ModelSpec":
        """Read ``NAME=CONFIG[,WEIGHTS]``.

        Of several "=" (a model called "K = 2") it is the first one with a file behind it that counts.

        Raises:
            InputError: it is nothing of the kind.
        """
        ends = [i for i, character in enumerate(text) if character == "="]
        splits = [(text[:i].rstrip(), *text[i + 1 :].partition(",")[::2]) for i in ends] or [("", "", "")]
        name, config_file, weights = next((x for x in splits if os.path.exists(os.path.expanduser(x[1]))), splits[0])
        if not name or not config_file:
            raise InputError(f"--model {text}: write it like --model NAME=CONFIG or --model NAME=CONFIG,WEIGHTS")
        return cls(name, config_file, weights)


@dataclass
class AnalysedModel:
    """A model with its weights, in eval mode on its device.

    Attributes:
        name: what pictures and tables call it.
        cfg: its config, whose datasets are registered.
        model: a :class:`~codetr_d2.modeling.meta_arch.CoDETR`.
    """

    name: str
    cfg: CfgNode
    model: nn.Module


def check_names(specs: Sequence[ModelSpec]) -> list[str]:
    """The names of the models.

    Raises:
        InputError: two of them are the same.
    """
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise InputError(f"--model: the names {', '.join(names)} are not all different; give each model one of its own")
    return names


def load_model(name: str, config_file: str, weights: str = "", opts: Sequence[str] = ()) -> AnalysedModel:
    """Build a model and load its weights.

    Args:
        name, config_file, weights: see :class:`ModelSpec`.
        opts: key, value, key, value, ... of the config.

    Raises:
        InputError: the config, a dataset of it or the weights are at fault.
    """
    return _build(name, _read_config(config_file, weights, opts))


def load_models(specs: Sequence[ModelSpec], opts: Sequence[str] = ()) -> Iterator[AnalysedModel]:
    """The models one after the other, so that no more than one is in memory. All configs are read first.

    Raises:
        InputError: as :func:`load_model`; two models have the same name, or are tested on different datasets.
    """
    names = check_names(specs)
    configs = [_read_config(spec.config_file, spec.weights, opts) for spec in specs]
    datasets = {tuple(cfg.DATASETS.TEST[:1]) for cfg in configs}
    if len(datasets) > 1:
        found = ", ".join(f"{name}: {list(cfg.DATASETS.TEST[:1])}" for name, cfg in zip(names, configs))
        raise InputError(
            f"the models have different test datasets ({found}), so that they could not be compared; add "
            "DATASETS.TEST '[\"NAME\"]' to the command line"
        )
    return (_build(name, cfg) for name, cfg in zip(names, configs))


def _read_config(config_file: str, weights: str, opts: Sequence[str]) -> CfgNode:
    """The config with its weights and its device, whose datasets are registered."""
    cfg = load_config(config_file, opts)
    cfg.MODEL.WEIGHTS = os.path.expanduser(weights) or cfg.MODEL.WEIGHTS
    cfg.MODEL.DEVICE = resolve_device(cfg)
    cfg.MODEL.CODETR.COMPILE = False  # hooks see nothing inside compiled modules
    register_datasets(cfg)
    cfg.freeze()
    return cfg


def _build(name: str, cfg: CfgNode) -> AnalysedModel:
    model = build_model(cfg.clone()).eval()
    CoDETRCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return AnalysedModel(name, cfg, model)


def images(analysed: AnalysedModel, number: int) -> MapDataset:
    """The first images of the model's first test dataset, with their ground truth, as inputs of the model.

    Args:
        analysed: the model, whose config names the dataset and the size of its images.
        number: of images at most.

    Returns:
        A sequence, read as it is gone through, of what :class:`CoDETRDatasetMapper` makes of each: ``image``
        ([C, H, W] uint8, resized as for testing) and ``instances`` with ``gt_boxes`` (xyxy in pixels of ``image``),
        ``gt_classes``, and ``gt_masks`` (:class:`BitMasks` of the size of ``image``) where every annotation of the
        dataset has a mask. Crowds are left out.

    Raises:
        InputError: there is no test dataset, it has no boxes, or an image is at fault.
    """
    cfg = analysed.cfg
    names = list(cfg.DATASETS.TEST[:1])
    records = load_datasets(cfg, names, is_train=False)
    dataset = annotated_images(names[0], cfg.MODEL.CODETR.NUM_CLASSES)
    if not dataset.is_annotated or not any(record.get("annotations") for record in records):
        raise InputError(
            f"DATASETS.TEST: {dataset.source} has no boxes, but an analysis needs ground truth; name another dataset"
        )
    # Not the mapper of a test, which drops the ground truth; but its augmentations.
    mapper = CoDETRDatasetMapper(
        **{
            **CoDETRDatasetMapper.from_config(cfg, is_train=True),
            "augmentations": build_augmentations(cfg, is_train=False),
            "max_num_pasted": 0,
            "use_instance_mask": not dataset.maskless,
            "instance_mask_format": "bitmask",
            "recompute_boxes": False,
        }
    )
    return MapDataset(list(islice(records, number)), mapper)
