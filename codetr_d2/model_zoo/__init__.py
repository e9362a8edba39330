"""Configs by name, and where published weights are; the interface is that of ``detectron2.model_zoo``."""

from .model_zoo import get, get_checkpoint_url, get_config, get_config_file

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file"]
