"""Where the numbers of a training go: the terminal, metrics.json, TensorBoard, Weights & Biases, MLflow."""

import json
import logging
import math
import os
import re
import time

import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import CommonMetricPrinter, EventWriter, TensorboardXWriter, get_event_storage

from ..checkpoint.checkpointer import atomic_write
from ..config.config_file import options_of
from ..errors import InputError, named_disk_problems

__all__ = ["MLflowWriter", "MetricsWriter", "ScalarWriter", "WandbWriter", "build_writers", "drop_metrics_from"]

logger = logging.getLogger(__name__)

_RUN_IDS = "tracked_runs.json"


def build_writers(cfg: CfgNode, start_iter: int, max_iter: int) -> list[EventWriter]:
    """A writer for each name in ``SOLVER.WRITERS``, after one that prints.

    Args:
        cfg: the config of the run.
        start_iter: the first iteration that is yet to be made; what has been written from there on counts no more.
        max_iter: the last one and 1, for the time that is left.

    Raises:
        InputError: Weights & Biases or MLflow does not take the run.
    """
    writers: list[EventWriter] = [CommonMetricPrinter(max_iter)]
    for name in dict.fromkeys(cfg.SOLVER.WRITERS):
        if name == "json":
            path = os.path.join(cfg.OUTPUT_DIR, "metrics.json")
            drop_metrics_from(path, start_iter)
            writers.append(MetricsWriter(path))
        elif name == "tensorboard":
            writers.append(TensorboardXWriter(cfg.OUTPUT_DIR, purge_step=start_iter or None))
        else:
            writers.append({"wandb": WandbWriter, "mlflow": MLflowWriter}[name](cfg, start_iter))
    return writers


class ScalarWriter(EventWriter):
    """A writer of scalars by iteration.

    Args:
        window_size: scalars that are smoothed are medians over so many iterations.
    """

    def __init__(self, window_size: int = 20):
        self._window_size = window_size
        self._last_write = -1

    def new_entries(self) -> dict[int, dict[str, float]]:
        """What has come since the call before: by iteration, from the first to the last, values by name."""
        entries = {}
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(self._window_size).items():
            if iteration > self._last_write:
                entries.setdefault(iteration, {})[name] = value
        self._last_write = max([self._last_write, *entries])
        return dict(sorted(entries.items()))

    def close(self, finished: bool = True) -> None:
        """
        Args:
            finished: the training has come to its end, and was not interrupted.
        """


class MetricsWriter(ScalarWriter):
    """Appends scalars to ``metrics.json`` as detectron2's ``JSONWriter`` does, one object a line, by iteration.

    What is not finite, like the AP of a class without objects, is null: JSON knows no NaN. A line is there as a whole
    or not at all.

    Args:
        path: of the file.
        window_size: see :class:`ScalarWriter`.

    Raises:
        InputError: from ``write``, where the disk is full.
    """

    def __init__(self, path: str, window_size: int = 20):
        super().__init__(window_size)
        self._path = path

    def write(self) -> None:
        lines = []
        for iteration, values in self.new_entries().items():
            values = {name: value if math.isfinite(value) else None for name, value in values.items()}
            lines.append(json.dumps({**values, "iteration": iteration}, sort_keys=True) + "\n")
        with named_disk_problems(self._path), open(self._path, "ab", buffering=0) as file:
            size = os.path.getsize(self._path)
            try:
                rest = "".join(lines).encode()
                while rest:
                    rest = rest[file.write(rest) :]  # as much as there was room for
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise


def drop_metrics_from(path: str, iteration: int) -> None:
    """Drop the entries of a ``metrics.json`` from ``iteration`` on: a resumed run writes them again."""
    if not os.path.isfile(path):
        return
    kept = []
    with open(path, "rb") as file:
        for line in file:
            try:
                if json.loads(line)["iteration"] < iteration:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                pass  # the killed run was writing this line
    atomic_write(path, lambda file: file.writelines(kept))


class WandbWriter(ScalarWriter):
    """Logs scalars by iteration to a run of Weights & Biases, beside the config.

    The run is in the project ``WANDB_PROJECT`` or else codetr_d2, under the name ``WANDB_NAME`` or else that of
    ``OUTPUT_DIR``; W&B's other environment variables count too. Its files lie in ``OUTPUT_DIR/wandb``. A resumed
    training goes on with its run. What is not finite is left out.

    Args:
        cfg: the config of the training.
        start_iter: the first iteration that is yet to be made.

    Raises:
        InputError: W&B does not take the run.
    """

    def __init__(self, cfg: CfgNode, start_iter: int):
        super().__init__()
        import wandb

        folder = cfg.OUTPUT_DIR
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "codetr_d2"),
                name=os.environ.get("WANDB_NAME", _name(folder)),
                id=_tracked_run(folder, "wandb", start_iter),
                resume="allow",
                dir=folder,
                config=yaml.safe_load(cfg.dump()),
                allow_val_change=True,  # options of a resumed training
            )
        except wandb.Error as error:
            raise InputError(
                f"SOLVER.WRITERS: wandb cannot begin a run: {_one_line(error)} Log in with `wandb login`, or set the "
                "environment variable WANDB_MODE=offline to write into OUTPUT_DIR alone"
            ) from error
        # W&B's own steps only rise; a resumed training goes back to its last checkpoint.
        self._run.define_metric("*", step_metric="iteration")
        _remember_run(folder, "wandb", self._run.id)

    def write(self) -> None:
        for iteration, values in self.new_entries().items():
            self._run.log({**_finite(values), "iteration": iteration})

    def close(self, finished: bool = True) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflowWriter(ScalarWriter):
    """Logs scalars by iteration to a run of MLflow, whose parameters are the options of the config.

    The run is where ``MLFLOW_TRACKING_URI`` says, in the experiment ``MLFLOW_EXPERIMENT_NAME`` or else codetr_d2, under
    the name of ``OUTPUT_DIR``. A resumed training goes on with its run. What is not finite is left out. MLflow's active
    run, which belongs to the whole process, is not touched.

    Args:
        cfg: the config of the training.
        start_iter: the first iteration that is yet to be made.

    Raises:
        InputError: MLflow does not take the run. Later failures are warned of, and cost only what was to be logged.
    """

    _MOST_METRICS, _MOST_PARAMS = 1000, 100  # of one request, as MLflow's servers have it

    def __init__(self, cfg: CfgNode, start_iter: int):
        super().__init__()
        import mlflow
        from mlflow import entities

        self._entities, self._error = entities, mlflow.exceptions.MlflowException
        folder = cfg.OUTPUT_DIR
        try:
            self._client = mlflow.MlflowClient()
            self._run_id = _tracked_run(folder, "mlflow", start_iter)
            if self._run_id is None:
                self._run_id = self._create_run(cfg)
            else:
                self._client.update_run(self._run_id, status="RUNNING")
        except self._error as error:
            raise InputError(
                f"SOLVER.WRITERS: mlflow cannot begin a run: {_one_line(error)} Set the environment variable "
                "MLFLOW_TRACKING_URI to a server or a file, like sqlite:///mlflow.db; where a training is resumed, as "
                "it was"
            ) from error
        _remember_run(folder, "mlflow", self._run_id)

    def _create_run(self, cfg: CfgNode) -> str:
        experiment_name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "codetr_d2")
        experiment = self._client.get_experiment_by_name(experiment_name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(experiment_name)
        run_id = self._client.create_run(experiment_id, run_name=_name(cfg.OUTPUT_DIR)).info.run_id
        params = [self._entities.Param(key, str(value)) for key, value in options_of(cfg, cfg)]
        for i in range(0, len(params), self._MOST_PARAMS):
            self._client.log_batch(run_id, params=params[i : i + self._MOST_PARAMS])
        return run_id

    def write(self) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._entities.Metric(_mlflow_name(name), value, now, iteration)
            for iteration, values in self.new_entries().items()
            for name, value in _finite(values).items()
        ]
        try:
            for i in range(0, len(metrics), self._MOST_METRICS):
                self._client.log_batch(self._run_id, metrics=metrics[i : i + self._MOST_METRICS])
        except self._error as error:  # a server that is away for a while must not end a training
            logger.warning("MLflow has not taken the metrics of iteration %d: %s", self._last_write, _one_line(error))

    def close(self, finished: bool = True) -> None:
        try:
            self._client.set_terminated(self._run_id, "FINISHED" if finished else "FAILED")
        except self._error as error:
            logger.warning("MLflow has not taken the end of the run: %s", _one_line(error))


def _name(folder: str) -> str:
    """What a tracker calls the run in this folder."""
    return os.path.basename(os.path.abspath(folder))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") + "."


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _mlflow_name(name: str) -> str:
    """The name of a scalar with the characters that MLflow allows; it also must not read as another path.

    The name of a class, which may be anything, comes after the first slash: ``bbox/AP-traffic light (red)``.
    """
    task, slash, metric = name.partition("/")
    return (task + slash + re.sub(r"[^\w\-. :]", "_", metric))[:250]


def _tracked_run(folder: str, tracker: str, start_iter: int) -> str | None:
    """The id that a resumed training's run has in a tracker; None where a training starts, or the tracker is new."""
    path = os.path.join(folder, _RUN_IDS)
    return _read_run_ids(path).get(tracker) if start_iter > 0 else None


def _remember_run(folder: str, tracker: str, run_id: str) -> None:
    path = os.path.join(folder, _RUN_IDS)
    run_ids = {**_read_run_ids(path), tracker: run_id}
    atomic_write(path, lambda file: file.write(json.dumps(run_ids).encode()))


def _read_run_ids(path: str) -> dict[str, str]:
    """
    Raises:
        InputError: the file is damaged.
    """
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (ValueError, TypeError):
        raise InputError(f"{path} is damaged; delete it to begin new runs in the trackers of SOLVER.WRITERS") from None
