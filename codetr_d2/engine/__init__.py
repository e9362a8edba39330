"""Training: configs, trainer, optimizer, moving average, processes."""

from ..config.config_file import check_config, check_output_dir, load_config
from .ema import ModelEMA
from .launch import run_processes
from .optimizer import build_optimizer
from .trainer import CoDETRTrainer, evaluate, setup, train

__all__ = [
    "CoDETRTrainer",
    "ModelEMA",
    "build_optimizer",
    "check_config",
    "check_output_dir",
    "evaluate",
    "load_config",
    "run_processes",
    "setup",
    "train",
]
