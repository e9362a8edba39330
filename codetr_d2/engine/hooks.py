"""Hooks of the trainer where detectron2's do not survive a resumed run."""

import logging
import os
import re
from collections.abc import Callable

from detectron2.engine import HookBase, hooks
from detectron2.evaluation import inference_context
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter
from torch import nn

from ..analysis.matches import FILE_NAME, Matches, match_objects
from ..checkpoint.checkpointer import CoDETRCheckpointer
from .writers import ScalarWriter

__all__ = [
    "BestCheckpointer",
    "EarlyStopping",
    "MatchRecorder",
    "PeriodicCheckpointer",
    "PeriodicWriter",
]

logger = logging.getLogger(__name__)


class BestCheckpointer(hooks.BestCheckpointer):
    """detectron2's, which also remembers the best value over a resume and warns once of a metric that is not there.

    Attributes:
        evaluations_since_best: evaluations after the one that gave the best value; known to the main process.
    """

    _warned = False
    evaluations_since_best = 0

    def _best_checking(self) -> None:
        if not comm.is_main_process():
            return
        if self._val_metric in self.trainer.storage.latest():
            before = self.best_iter
            super()._best_checking()
            self.evaluations_since_best = self.evaluations_since_best + 1 if self.best_iter == before else 0
        elif not self._warned:
            self._warned = True
            known = sorted(key for key in self.trainer.storage.latest() if "/" in key)
            self._logger.warning(
                "TEST.BEST_CHECKPOINT_METRIC: the evaluation gave no %r, so no model_best.pth is kept. It gave: %s",
                self._val_metric,
                ", ".join(known) or "nothing",
            )

    def state_dict(self) -> dict:
        return {
            "best_metric": self.best_metric,
            "best_iter": self.best_iter,
            "evaluations_since_best": self.evaluations_since_best,
        }

    def load_state_dict(self, state: dict) -> None:
        self.best_metric, self.best_iter = state["best_metric"], state["best_iter"]
        self.evaluations_since_best = state.get("evaluations_since_best", 0)  # checkpoints of earlier versions lack it


class EarlyStopping(HookBase):
    """End the training, in all processes after the same step, when evaluations have brought nothing better for long.

    The step becomes the last one of the run, whose checkpoint, final weights and results are written as ever. A run
    that has ended so and is resumed ends at once, unless ``patience`` has been raised.

    Args:
        best: the hook that compares each evaluation with the best one; it must come before this one, in all processes.
        period: iterations between evaluations.
        patience: evaluations without a better one after which the training ends.
    """

    def __init__(self, best: BestCheckpointer, period: int, patience: int):
        self._best = best
        self._period = period
        self._patience = patience

    def before_train(self) -> None:
        self._end_after(self.trainer.start_iter)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0 and done != self.trainer.max_iter:
            self._end_after(done)

    def _end_after(self, done: int) -> None:
        """End the training after ``done`` steps, if the main process finds that it has waited long enough."""
        waited = comm.all_gather(self._best.evaluations_since_best)[0]
        if waited < self._patience or done >= self.trainer.max_iter:
            return
        logger.info(
            "The training ends early, after %d iterations: the last %d evaluations were not better than the best one "
            "before them (TEST.EARLY_STOPPING_PATIENCE %d)",
            *(done, waited, self._patience),
        )
        self.trainer.max_iter = done


class MatchRecorder(HookBase):
    """Write into ``matches.json`` which query each object is matched with, at each evaluation.

    The weights are those in training, not their moving average. A resumed run goes on with the file; what is later than
    its checkpoint is dropped. For the main process.

    Args:
        model: a :class:`~codetr_d2.modeling.meta_arch.CoDETR`, not wrapped.
        inputs: images with ``image_id`` and ``instances``, resized as for testing.
        period: iterations between evaluations.
        folder: that of the run.
    """

    def __init__(self, model: nn.Module, inputs: list[dict], period: int, folder: str):
        self._model = model
        self._inputs = inputs
        self._period = period
        self._path = os.path.join(folder, FILE_NAME)

    def before_train(self) -> None:
        image_ids = [x["image_id"] for x in self._inputs]
        self._matches = Matches.resume(self._path, image_ids, self.trainer.start_iter)

    def after_step(self) -> None:
        iteration = self.trainer.iter
        if (iteration + 1) % self._period and iteration != self.trainer.max_iter - 1:
            return
        with inference_context(self._model):
            queries = [match_objects(self._model, x) for x in self._inputs]
        self._matches.evaluations.append((iteration, queries))
        self._matches.write(self._path)


class PeriodicCheckpointer(HookBase):
    """Save a checkpoint every ``period`` iterations and after the last one, and delete all but the newest ``keep``."""

    def __init__(self, checkpointer: CoDETRCheckpointer, period: int, keep: int = 3):
        self._checkpointer = checkpointer
        self._period = period
        self._keep = keep

    def after_step(self) -> None:
        iteration = self.trainer.iter
        if (iteration + 1) % self._period and iteration != self.trainer.max_iter - 1:
            return
        self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        folder = self._checkpointer.save_dir
        saved = [(int(m[1]), name) for name in os.listdir(folder) if (m := re.fullmatch(r"model_(\d{7,})\.pth", name))]
        for _, name in sorted(x for x in saved if x[0] <= iteration)[: -self._keep]:
            os.remove(os.path.join(folder, name))


class PeriodicWriter(hooks.PeriodicWriter):
    """detectron2's, which also writes after each evaluation, so that a checkpoint never leaves its results behind.

    Args:
        build_writers: called when training starts: when it is known from which iteration.
        eval_period: iterations between evaluations, 0 for none.
        period: iterations between writes.
    """

    def __init__(self, build_writers: Callable[[], list[EventWriter]], eval_period: int, period: int = 20):
        super().__init__([], period)
        self._build_writers = build_writers
        self._eval_period = eval_period

    def before_train(self) -> None:
        self._writers = self._build_writers()

    def after_step(self) -> None:
        if self._eval_period and (self.trainer.iter + 1) % self._eval_period == 0:
            for writer in self._writers:
                writer.write()
        else:
            super().after_step()

    def after_train(self) -> None:
        finished = self.trainer.iter >= self.trainer.max_iter
        for writer in self._writers:
            if not (finished and isinstance(writer, CommonMetricPrinter)):  # it would print the last iteration again
                writer.write()
            writer.close(finished) if isinstance(writer, ScalarWriter) else writer.close()
