"""Configs by their path in configs/, like "co_dino/co_dino_5scale_r50_1x_coco.yaml", and models made of them."""

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ..checkpoint.checkpointer import CoDETRCheckpointer
from ..config.config_file import load_config
from ..config.zoo import zoo_folder, zoo_neighbours
from ..errors import InputError

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file"]

# What the authors publish as files that can be fetched: all of their models with ViT-L.
_HUGGING_FACE = {
    "co_dino_vit/co_dino_5scale_vit_large_coco.yaml": "co-detr-vit-large-coco",
    "co_dino_vit/co_dino_5scale_vit_large_coco_instance.yaml": "co-detr-vit-large-coco-instance",
    "co_dino_vit/co_dino_5scale_lsj_vit_large_lvis.yaml": "co-detr-vit-large-lvis",
    "co_dino_vit/co_dino_5scale_lsj_vit_large_lvis_instance.yaml": "co-detr-vit-large-lvis-instance",
}


def get_config_file(config_path: str) -> str:
    """The file of a config.

    Args:
        config_path: its path relative to configs/.

    Raises:
        InputError: there is none of this name.
    """
    file = zoo_folder() / config_path
    if not file.is_file():
        raise InputError(f"{config_path}: no such config in the model zoo. {zoo_neighbours(config_path)}")
    return str(file)


def get_checkpoint_url(config_path: str) -> str:
    """The address of the published weights of a config, for ``MODEL.WEIGHTS``.

    Args:
        config_path: its path relative to configs/.

    Raises:
        InputError: there is no such config, or its weights cannot be fetched by address.
    """
    get_config_file(config_path)
    if config_path not in _HUGGING_FACE:
        raise InputError(
            f"{config_path}: its weights have no address that a program can fetch. MODEL_ZOO.md says where the authors "
            "publish them; download the file, and give its path as MODEL.WEIGHTS"
        )
    return f"hf://zongzhuofan/{_HUGGING_FACE[config_path]}/pytorch_model.pth"


def get_config(config_path: str, trained: bool = False) -> CfgNode:
    """The config itself.

    Args:
        config_path: its path relative to configs/.
        trained: ``MODEL.WEIGHTS`` is the address of the published weights; otherwise what the config starts its
            training from.

    Raises:
        InputError: see :func:`get_checkpoint_url`.
    """
    cfg = load_config(get_config_file(config_path))
    if trained:
        cfg.MODEL.WEIGHTS = get_checkpoint_url(config_path)
    return cfg


def get(config_path: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """The model of a config, with the weights of :func:`get_config`, in training mode.

    Args:
        config_path, trained: see :func:`get_config`.
        device: "cpu" or "cuda"; None for that of the config.

    Raises:
        InputError: see :func:`get_checkpoint_url`; the weights are missing or cannot be fetched.
    """
    cfg = get_config(config_path, trained)
    if device is not None:
        cfg.MODEL.DEVICE = device
    model = build_model(cfg)
    CoDETRCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model
