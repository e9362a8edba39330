"""The trainer: detectron2's, made exactly resumable, with mixed precision, accumulation and a moving average."""

import logging
import math
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, SimpleTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.events import EventWriter, get_event_storage
from detectron2.utils.logger import setup_logger
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ..analysis.models import AnalysedModel, images
from ..checkpoint.checkpointer import CoDETRCheckpointer, last_whole
from ..config.config_file import resolve_device, save_config
from ..config.output_dir import check_training_data, training_data
from ..data.datasets import check_registered, class_names, load_datasets, register_datasets
from ..data.loader import build_test_loader, build_train_loader
from ..data.mapper import CoDETRDatasetMapper
from ..data.samplers import derive_seed, seed_rng
from ..data.shared import SharedRecords
from ..errors import InputError, named_disk_problems
from ..evaluation import DetectionEvaluator, evaluation_style
from ..inference.exported import ExportedDetector, is_exported
from .anchor_check import warn_of_unsuitable_anchors
from .ema import ModelEMA
from .hooks import (
    BestCheckpointer,
    EarlyStopping,
    MatchRecorder,
    PeriodicCheckpointer,
    PeriodicWriter,
)
from .log_file import LogFile, one_line_errors
from .model_cost import log_detection_flops
from .optimizer import build_optimizer, clip_full_model, schedule_in_iterations
from .writers import build_writers

__all__ = ["CoDETRTrainer", "StepTrainer", "autocast", "evaluate", "setup", "train"]

logger = logging.getLogger(__name__)


def autocast(cfg: CfgNode) -> torch.autocast:
    """The context of ``SOLVER.AMP``, for training on ``MODEL.DEVICE``; it changes nothing where that is not enabled."""
    return torch.autocast(
        torch.device(cfg.MODEL.DEVICE).type, dtype=getattr(torch, cfg.SOLVER.AMP.DTYPE), enabled=cfg.SOLVER.AMP.ENABLED
    )


class StepTrainer(SimpleTrainer):
    """One optimizer step: losses of all micro-batches, gradients, clipping, update.

    ``SOLVER.ACCUMULATE_STEPS`` micro-batches give the mean of their losses, that is the loss of the whole batch but for
    normalisers that a model takes from its batch. All randomness of the model comes from (seed, iteration, process).

    Args:
        model: returns a dict of scalar losses in training; may be wrapped in ``DistributedDataParallel``.
        data_loader: gives this process's share of each batch as a list.
        optimizer: for the parameters of the model.
        cfg: ``SOLVER``, ``MODEL.DEVICE`` and ``OUTPUT_DIR``.
        seed: of the run.

    Raises:
        InputError: a loss or, where no loss scaling is at work, the gradient is not finite. The weights and the state
            of the optimizer are still those of the step before. The message names the iteration and the images.
    """

    def __init__(
        self, model: nn.Module, data_loader: DataLoader, optimizer: torch.optim.Optimizer, cfg: CfgNode, seed: int = 0
    ):
        super().__init__(model, data_loader, optimizer)
        self.cfg = cfg
        self.seed = seed
        self.autocast = autocast(cfg)
        uses_float16 = cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "float16"
        self.grad_scaler = torch.amp.GradScaler(torch.device(cfg.MODEL.DEVICE).type, enabled=uses_float16)

    def run_step(self) -> None:
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        seed_rng(derive_seed(self.seed, "step", self.iter, comm.get_rank()))
        self.optimizer.zero_grad()
        steps = self.cfg.SOLVER.ACCUMULATE_STEPS
        size = len(batch) // steps
        sums = 0
        for i in range(steps):
            micro_batch = batch[i * size : (i + 1) * size]
            is_distributed = isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if is_distributed and i < steps - 1 else nullcontext():
                names, losses = self._losses(micro_batch)
                self.grad_scaler.scale(losses.sum() / steps).backward()
            sums = sums + losses.detach() / steps
        self.grad_scaler.unscale_(self.optimizer)
        norm = clip_full_model(self.optimizer, self.cfg, in_step=not self.grad_scaler.is_enabled())

        self._write_step([*names, "grad_norm"], torch.cat((sums, norm[None])), data_time, batch)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _losses(self, batch: list[dict]) -> tuple[list[str], Tensor]:
        """Names and values [n] of the losses, float32."""
        try:
            with self.autocast:
                losses = self.model(batch)
        except FloatingPointError as error:  # detectron2's RPN looks at its proposals before any loss is known
            raise InputError(self._message(str(error), _files(batch))) from error
        return list(losses), torch.stack([loss.float() for loss in losses.values()])

    def _write_step(self, names: list[str], values: Tensor, data_time: float, batch: list[dict]) -> None:
        """Log the step, once its values, which reach the host in one copy, have proved finite."""
        if comm.get_world_size() > 1:
            dist.all_reduce(values)
            values = values / comm.get_world_size()
        scalars = dict(zip(names, values.tolist()))
        faulty = {name: value for name, value in scalars.items() if not math.isfinite(value)}
        if self.grad_scaler.is_enabled():
            faulty.pop("grad_norm", None)  # the scaler skips such a step and lowers its scale
        if faulty:  # in every process alike, as the values are the mean over all
            files = [file for files in comm.all_gather(_files(batch)) for file in files]
            shown = ", ".join(f"{name}={value}" for name, value in faulty.items())
            raise InputError(self._message(f"not finite: {shown}", files))
        storage = get_event_storage()
        norm = scalars.pop("grad_norm")
        storage.put_scalars(total_loss=sum(scalars.values()), grad_norm=norm, data_time=data_time, **scalars)

    def _message(self, what: str, files: list[str]) -> str:
        return (
            f"training stopped at iteration {self.iter}: {what.rstrip('.')}. Images of this step: {', '.join(files)}. "
            f"{last_whole(self.cfg.OUTPUT_DIR)} Look at the boxes of these images, or lower SOLVER.BASE_LR."
        )

    def state_dict(self) -> dict:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            raise InputError(
                f"the checkpoint's optimizer does not fit this config's ({error}); set the options of the model and "
                "SOLVER.LR_MULTIPLIERS as they were"
            ) from None
        if self.grad_scaler.is_enabled() and state_dict["grad_scaler"]:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _files(batch: list[dict]) -> list[str]:
    return [str(sample.get("file_name")) for sample in batch]


class _EndsEarly(BaseException):
    """Leaves detectron2's loop, whose number of steps is fixed when it starts; an ``Exception`` it would log."""


class _WeightsCheckpointer(CoDETRCheckpointer):
    """Saves weights to deploy, the moving average if there is one, and is not for resuming from."""

    def __init__(self, model: nn.Module, save_dir: str, ema: ModelEMA | None):
        super().__init__(model, save_dir)
        self._ema = ema

    def save(self, name: str, **kwargs) -> None:
        with self._ema.applied() if self._ema else nullcontext():
            super().save(name, **kwargs)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        pass


class CoDETRTrainer(DefaultTrainer):
    """detectron2's ``DefaultTrainer`` for the options that :func:`codetr_d2.add_codetr_config` adds.

    Writes into ``OUTPUT_DIR``: ``model_XXXXXXX.pth`` (all that a resumed run needs, the newest three),
    ``last_checkpoint`` (the name of the newest), ``model_best.pth`` and ``model_final.pth`` (weights to use, those of
    the moving average where it is enabled), ``metrics.json`` and TensorBoard's files.

    A resumed run ends with the same weights as one that was never stopped: bit for bit where the operations are
    themselves deterministic, as they are on the CPU with the same number of processes and threads.

    Raises:
        InputError: the data are at fault.
    """

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)  # not DefaultTrainer's, which wraps the model for GPUs only and knows no bfloat16
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        logger.info("Seed of this run: %d", self.seed)
        seed_rng(derive_seed(self.seed, "model"))
        data_loader = self.build_train_loader(cfg)
        self._data = training_data(cfg, len(data_loader.dataset))
        self.cfg = cfg = schedule_in_iterations(cfg, round(data_loader.batch_sampler.epoch_size))
        self.bare_model = self.build_model(cfg)
        if comm.is_main_process():
            log_detection_flops(cfg, self.bare_model)
            warn_of_unsuitable_anchors(cfg, self.bare_model, data_loader.dataset.records)
        optimizer = self.build_optimizer(cfg, self.bare_model)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
        model = create_ddp_model(
            self.bare_model, broadcast_buffers=False, device_ids=None if on_cpu else [torch.cuda.current_device()]
        )
        self._trainer = StepTrainer(model, data_loader, optimizer, cfg)
        self.max_iter = cfg.SOLVER.MAX_ITER

        ema_options = cfg.SOLVER.EMA
        self.ema = (
            ModelEMA(self.bare_model, ema_options.DECAY, ema_options.WARMUP_ITERS) if ema_options.ENABLED else None
        )
        checkpointables = {"ema": self.ema} if self.ema else {}
        self.checkpointer = CoDETRCheckpointer(
            self.bare_model,
            cfg.OUTPUT_DIR,
            fine_tune=True,
            class_names=cfg.MODEL.CODETR.CLASS_NAMES,
            reuse_classes=cfg.MODEL.CODETR.REUSE_CLASSES,
            trainer=weakref.proxy(self),
            **checkpointables,
        )
        self.weights_checkpointer = _WeightsCheckpointer(self.bare_model, cfg.OUTPUT_DIR, self.ema)
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list:
        # What an iteration leaves behind is written before its checkpoint, which is the last to come: a run that is
        # resumed from it has nothing to make up for.
        cfg = self.cfg

        evaluated_after = None

        def evaluate_and_keep() -> dict:
            nonlocal evaluated_after
            done = min(self.iter + 1, self.max_iter)
            if evaluated_after != done:  # after an early end these are the weights that have just been evaluated
                with self.ema.applied() if self.ema else nullcontext():
                    self._last_eval_results = self.test(cfg, self.bare_model)
                evaluated_after = done
            return self._last_eval_results

        result = [hooks.IterationTimer(), hooks.LRScheduler()]
        if cfg.DATASETS.TEST:
            result.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, evaluate_and_keep))
            if cfg.TEST.BEST_CHECKPOINT_METRIC:
                best = BestCheckpointer(
                    cfg.TEST.EVAL_PERIOD, self.weights_checkpointer, cfg.TEST.BEST_CHECKPOINT_METRIC
                )
                result.append(best)
                if cfg.TEST.EARLY_STOPPING_PATIENCE:
                    result.append(EarlyStopping(best, cfg.TEST.EVAL_PERIOD, cfg.TEST.EARLY_STOPPING_PATIENCE))
        if cfg.TEST.STABILITY_IMAGES:
            inputs = images(AnalysedModel("", cfg, self.bare_model), cfg.TEST.STABILITY_IMAGES)  # all processes load
            if comm.is_main_process():
                folder = cfg.OUTPUT_DIR
                result.append(MatchRecorder(self.bare_model, list(inputs), cfg.TEST.EVAL_PERIOD, folder))
        if comm.is_main_process():
            result.append(PeriodicWriter(self.build_writers, cfg.TEST.EVAL_PERIOD))
            result.append(PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD))
        return result

    def build_writers(self) -> list[EventWriter]:
        return build_writers(self.cfg, self.start_iter, self.max_iter)

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the last checkpoint of ``OUTPUT_DIR`` if ``resume`` and there is one; else load ``MODEL.WEIGHTS``.

        Raises:
            InputError: the file is at fault, or the run has other data or is already longer than ``SOLVER.MAX_ITER``.
        """
        super().resume_or_load(resume)
        if self.ema and not self.ema.loaded:
            self.ema.restart()

    def train(self) -> OrderedDict | None:
        """Train, evaluate, and return the last results of the evaluation, None without any."""
        self._trainer.seed = self.data_loader.batch_sampler.seed = self.seed
        self.data_loader.batch_sampler.start_iteration = self.start_iter
        with suppress(_EndsEarly):
            TrainerBase.train(self, self.start_iter, self.max_iter)
        results = getattr(self, "_last_eval_results", None)
        if comm.is_main_process():
            verify_results(self.cfg, results or {})
        return results

    def before_step(self) -> None:
        if self.iter >= self.max_iter:  # a hook has lowered it: this step is not to be made any more
            raise _EndsEarly
        super().before_step()

    def run_step(self) -> None:
        with self._failing_step_does_not_count():
            super().run_step()
        if self.ema:
            self.ema.update(self.iter)

    def after_step(self) -> None:
        with self._failing_step_does_not_count():
            super().after_step()

    @contextmanager
    def _failing_step_does_not_count(self) -> Iterator[None]:
        """After a failure the iteration is the last whole one: its hooks don't take it for the end of the training."""
        try:
            yield
        except BaseException:
            self.iter -= 1
            raise

    def after_train(self) -> None:
        self._trainer._data_loader_iter_obj = None  # ends its workers, which the last evaluation has no use for
        self.iter = min(self.iter, self.max_iter)  # it is one more where a finished run was resumed
        if self.iter == self.max_iter:
            self.weights_checkpointer.save("model_final", iteration=self.max_iter - 1)
        super().after_train()

    def state_dict(self) -> dict:
        return {**super().state_dict(), "seed": self.seed, "data": self._data}

    def load_state_dict(self, state_dict: dict) -> None:
        check_training_data(self.cfg, state_dict.get("data", self._data), self._data)
        done = state_dict["iteration"] + 1
        if done > self.max_iter:
            raise InputError(
                f"SOLVER.MAX_ITER is {self.max_iter}, but the run in {self.cfg.OUTPUT_DIR} has done {done} iterations "
                "already; set it higher, or choose another OUTPUT_DIR"
            )
        rates = self.scheduler.base_lrs
        super().load_state_dict(state_dict)
        # The schedule goes on where it was, with the options of this config.
        self.scheduler.base_lrs = rates
        for group, rate in zip(self._trainer.optimizer.param_groups, self.scheduler.get_lr()):
            group["lr"] = rate
        if state_dict["seed"] != self.seed:
            self.seed = state_dict["seed"]
            logger.info("The resumed run goes on with its seed, %d", self.seed)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info(
            "%.1f million parameters, %.1f of them trained",
            sum(p.numel() for p in model.parameters()) / 1e6,
            trained / 1e6,
        )
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        records = SharedRecords.of(load_datasets(cfg, cfg.DATASETS.TRAIN, True))
        return build_train_loader(cfg, records, CoDETRDatasetMapper(cfg, True, records=records))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        return build_test_loader(cfg, load_datasets(cfg, [dataset_name], False), CoDETRDatasetMapper(cfg, False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """COCO's evaluation, also where the dataset does not name one, or LVIS's: see :class:`DetectionEvaluator`.

        Both limit the detections of an image as their published numbers do, to 100 and 300, whatever
        ``TEST.DETECTIONS_PER_IMAGE`` is.
        """
        return DetectionEvaluator(dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference"))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Sequence[DatasetEvaluator] | None = None) -> OrderedDict:
        """Evaluate on ``DATASETS.TEST``.

        Raises:
            InputError: the model computes no finite numbers.
        """
        try:
            return super().test(cfg, model, evaluators)
        except FloatingPointError as error:
            raise InputError(
                f"evaluation stopped: {error}. The weights are damaged, or their training has diverged: take an "
                "earlier checkpoint, and lower SOLVER.BASE_LR"
            ) from error


def setup(cfg: CfgNode, eval_only: bool = False) -> CfgNode:
    """What each process of a job needs first: loggers, the device, the datasets and the names of their classes.

    Returns:
        A frozen copy of the config with these filled in.

    Raises:
        InputError: a dataset is at fault.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if eval_only:
        cfg.DATASETS.TRAIN = ()  # its files may be missing
    log_file = LogFile(cfg.OUTPUT_DIR, comm.get_rank())
    for name in ("fvcore", "detectron2", "codetr_d2"):
        run_logger = setup_logger(None, comm.get_rank(), name=name)
        for handler in [x for x in run_logger.handlers if isinstance(x, LogFile)]:  # of a run before, in this process
            run_logger.removeHandler(handler)
            handler.close()
        run_logger.addHandler(log_file)
    logging.getLogger("detectron2.engine.train_loop").addFilter(one_line_errors)
    logger.info("Process %d of %d. Environment:\n%s", comm.get_rank() + 1, comm.get_world_size(), collect_env_info())
    device = resolve_device(cfg)
    if device != cfg.MODEL.DEVICE:
        logger.warning("MODEL.DEVICE is %s, but there is no GPU: running on the CPU", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = device
    register_datasets(cfg)
    check_registered((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    for name in cfg.DATASETS.TEST:
        evaluation_style(name)
    cfg.MODEL.CODETR.CLASS_NAMES = class_names(cfg)
    if not eval_only:
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    if getattr(cfg, "FLOAT32_PRECISION", ""):  # not every detectron2 has it
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
    cfg.freeze()
    return cfg


def train(cfg: CfgNode, resume: bool = False) -> OrderedDict | None:
    """Train in this process, one of those of the job. The config is one that :func:`setup` returned.

    Returns:
        The results of the last evaluation on the main process, empty on others; None without any.

    Raises:
        InputError: the data, the weights or the disk are at fault, or the training diverges.
    """
    trainer = CoDETRTrainer(cfg)
    trainer.resume_or_load(resume)
    with named_disk_problems(cfg.OUTPUT_DIR):
        if comm.is_main_process():
            cfg = trainer.cfg.clone()
            cfg.defrost()
            cfg.SEED = trainer.seed
            save_config(cfg)
        return trainer.train()


def evaluate(cfg: CfgNode, resume: bool = False) -> OrderedDict:
    """Evaluate ``MODEL.WEIGHTS``, or with ``resume`` the last checkpoint of ``OUTPUT_DIR``, on ``DATASETS.TEST``.

    Files that tools/export.py wrote are run by their own runtime.

    Returns:
        The results on the main process, empty on others.
    """
    if is_exported(cfg.MODEL.WEIGHTS) and not resume:
        model = ExportedDetector(cfg.MODEL.WEIGHTS, cfg.INPUT.FORMAT)
    else:
        model = CoDETRTrainer.build_model(cfg)
        CoDETRCheckpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    with named_disk_problems(cfg.OUTPUT_DIR):
        results = CoDETRTrainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results
