"""Training: configs, trainer, optimizer, moving average, processes."""

from ..config.checks import check_config
from ..config.config_file import load_config
from ..config.output_dir import check_output_dir
from .ema import ModelEMA
from .launch import Terminated, run_processes
from .optimizer import build_optimizer
from .trainer import CoDETRTrainer, evaluate, setup, train

__all__ = [
    "CoDETRTrainer",
    "ModelEMA",
    "Terminated",
    "build_optimizer",
    "check_config",
    "check_output_dir",
    "evaluate",
    "load_config",
    "run_processes",
    "setup",
    "train",
]
