"""``SOLVER.WRITERS``: what each of them writes, without network; W&B and MLflow themselves where they are installed."""

import importlib.machinery
import json
import math
import os
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage

import train_net
from codetr_d2.engine import check_config, load_config
from codetr_d2.engine.trainer import CoDETRTrainer
from codetr_d2.engine.writers import build_writers
from codetr_d2.errors import InputError

SHORT = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2)


def module(name, **attributes):
    result = ModuleType(name)
    result.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="a test")
    vars(result).update(attributes)
    return result


@pytest.fixture
def wandb(monkeypatch):
    """In place of W&B: a module whose ``runs`` are those that have been begun, with what was logged to them."""

    class Error(Exception):
        pass

    class Run:
        def __init__(self, options):
            self.options, self.rows, self.metrics, self.exit_code = options, [], [], None
            self.id = options["id"] or f"run{len(fake.runs)}"

        def define_metric(self, name, step_metric):
            self.metrics.append((name, step_metric))

        def log(self, row):
            self.rows.append(row)

        def finish(self, exit_code):
            self.exit_code = exit_code

    def init(**options):
        fake.runs.append(Run(options))
        return fake.runs[-1]

    fake = module("wandb", Error=Error, init=init, runs=[])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return fake


@pytest.fixture
def mlflow(monkeypatch):
    """In place of MLflow: a module with the ``experiments`` and ``runs`` that its clients have made."""

    class MlflowException(Exception):
        pass

    class MlflowClient:
        def get_experiment_by_name(self, name):
            return SimpleNamespace(experiment_id=fake.experiments[name]) if name in fake.experiments else None

        def create_experiment(self, name):
            return fake.experiments.setdefault(name, f"experiment{len(fake.experiments)}")

        def create_run(self, experiment_id, run_name):
            run = SimpleNamespace(experiment=experiment_id, name=run_name, params={}, metrics=[], status="RUNNING")
            fake.runs[f"run{len(fake.runs)}"] = run
            return SimpleNamespace(info=SimpleNamespace(run_id=f"run{len(fake.runs) - 1}"))

        def update_run(self, run_id, status):
            if run_id not in fake.runs:
                raise MlflowException("no such\nrun.")
            fake.runs[run_id].status = status

        def log_batch(self, run_id, metrics=(), params=()):
            assert len(metrics) <= 1000 and len(params) <= 100
            if fake.is_away:
                raise MlflowException("the server is away")
            fake.runs[run_id].metrics += metrics
            fake.runs[run_id].params.update(params)

        def set_terminated(self, run_id, status):
            fake.runs[run_id].status = status

    fake = module("mlflow", MlflowClient=MlflowClient, experiments={}, runs={}, is_away=False)
    fake.exceptions = module("mlflow.exceptions", MlflowException=MlflowException)
    fake.entities = module("mlflow.entities", Metric=lambda *args: args, Param=lambda *args: args)
    for each in (fake, fake.exceptions, fake.entities):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return fake


def metrics_of(folder):
    """What metrics.json says: by iteration, the finite values by name."""
    entries = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {entry.pop("iteration"): {k: v for k, v in entry.items() if v is not None} for entry in entries}


def test_wandb_gets_what_metrics_json_gets(run_training, wandb, tmp_path):
    run_training(*SHORT, "SOLVER.WRITERS", ["json", "wandb"])
    (run,) = wandb.runs
    expected = metrics_of(tmp_path / "run")
    assert {1, 3, 4} <= expected.keys() and {"bbox/AP", "total_loss", "lr"} <= expected[1].keys()
    assert {row.pop("iteration"): row for row in run.rows} == expected
    assert run.metrics == [("*", "iteration")] and run.exit_code == 0
    options = run.options
    assert (options["project"], options["name"], options["dir"]) == ("codetr_d2", "run", str(tmp_path / "run"))
    assert options["config"]["SOLVER"]["MAX_ITER"] == 4
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith("events.out")]


def test_mlflow_gets_what_metrics_json_gets(run_training, mlflow, tmp_path):
    run_training(*SHORT, "SOLVER.WRITERS", ["json", "mlflow"])
    (run,) = mlflow.runs.values()
    logged = {}
    for name, value, _, iteration in run.metrics:
        logged.setdefault(iteration, {})[name] = value
    assert logged == metrics_of(tmp_path / "run")
    assert (run.name, run.status, list(mlflow.experiments)) == ("run", "FINISHED", ["codetr_d2"])
    assert run.params["SOLVER.MAX_ITER"] == "4" and len(run.params) > 100


def test_a_resumed_training_goes_on_with_its_runs_and_a_new_one_does_not(
    make_config, run_training, wandb, mlflow, tmp_path
):
    opts = (*SHORT, "SOLVER.WRITERS", ["json", "mlflow", "wandb"])
    trainer = CoDETRTrainer(make_config(*opts))
    run_step = trainer.run_step

    def run_step_until_interrupted():
        if trainer.iter == 3:
            raise KeyboardInterrupt
        run_step()

    trainer.run_step = run_step_until_interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert wandb.runs[0].exit_code == 1 and mlflow.runs["run0"].status == "FAILED"
    run_training(*opts, resume=True)
    first, again = wandb.runs
    assert again.id == first.id == "run0" and again.options["resume"] == "allow" and again.exit_code == 0
    assert list(mlflow.runs) == ["run0"] and mlflow.runs["run0"].status == "FINISHED"
    run_training(*opts)
    assert wandb.runs[2].id == "run2" and list(mlflow.runs) == ["run0", "run1"]

    mlflow.runs.clear()  # another server
    with pytest.raises(InputError, match="mlflow cannot begin a run: no such run. Set .* resumed, as it was"):
        run_training(*opts, resume=True)
    (tmp_path / "run" / "tracked_runs.json").write_text("[")
    with pytest.raises(InputError, match="tracked_runs.json is damaged; delete it"):
        run_training(*opts, resume=True)


def test_names_and_values_that_mlflow_does_not_take(make_config, mlflow):
    _, writer = build_writers(make_config("SOLVER.WRITERS", ["mlflow"]), 0, 9)
    with EventStorage(3) as storage:
        names = ["bbox/AP-light (red)", "bbox/AP-a/../b", "bbox/AP-Ä 1.5:2", "loss_cls", "bbox/AP-" + 300 * "x"]
        storage.put_scalars(**dict.fromkeys(names, 1.0), gone=math.nan, smoothing_hint=False)
        storage.put_scalars(**{f"bbox/AP-{i}": 0.5 for i in range(1200)}, smoothing_hint=False)
        writer.write()
    logged = [name for name, *_ in mlflow.runs["run0"].metrics]
    assert logged[:4] == ["bbox/AP-light _red_", "bbox/AP-a_.._b", "bbox/AP-Ä 1.5:2", "loss_cls"]
    assert len(logged) == 1205 and max(map(len, logged)) == 250 and "gone" not in logged


def test_a_server_that_is_away_does_not_end_a_training(run_training, mlflow, monkeypatch, tmp_path):
    """It goes away once the run has begun."""
    log_to_server = mlflow.MlflowClient.log_batch

    def log_batch(self, *args, metrics=(), **options):
        mlflow.is_away = len(metrics) > 0
        log_to_server(self, *args, metrics=metrics, **options)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", log_batch)
    assert run_training(*SHORT, "SOLVER.WRITERS", ["json", "mlflow"]).iter == 4
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "MLflow has not taken the metrics of iteration 1: the server is away." in log
    assert mlflow.runs["run0"].status == "FINISHED" and not mlflow.runs["run0"].metrics


def test_no_login_is_one_line_before_the_first_step(config_file, wandb, monkeypatch, capsys):
    def init(**options):
        raise wandb.Error("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(SystemExit) as exit:
        train_net.main(["--config-file", str(config_file), "SOLVER.WRITERS", "['wandb']"])
    output, errors = capsys.readouterr()
    last = errors.strip().splitlines()[-1]
    assert exit.value.code == 2 and "Traceback" not in output + errors
    assert last.startswith("error: SOLVER.WRITERS: wandb cannot begin a run: No API key") and "WANDB_MODE=off" in last


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named_with_the_command(config_file, monkeypatch, name):
    cfg = load_config(str(config_file), ["SOLVER.WRITERS", f"['json', '{name}']"])
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    message = rf"SOLVER\.WRITERS has '{name}', .*run `python -m pip install {name}`, or take '{name}' out"
    with pytest.raises(InputError, match=message):
        check_config(cfg)
    cfg.SOLVER.WRITERS = ["csv"]
    with pytest.raises(InputError, match="SOLVER.WRITERS is 'csv'; it may be: json, tensorboard, wandb, mlflow"):
        check_config(cfg)


def test_a_folder_that_wandb_has_left_is_no_package(config_file, monkeypatch, tmp_path):
    cfg = load_config(str(config_file), ["SOLVER.WRITERS", "['json']"])
    check_config(cfg)  # imports what it needs
    cfg.SOLVER.WRITERS = ["wandb"]
    (tmp_path / "elsewhere" / "wandb").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere")])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(InputError, match="the package wandb is not installed"):
        check_config(cfg)


@pytest.mark.slow
def test_wandb_itself_offline(run_training, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_training(*SHORT, "SOLVER.WRITERS", ["json", "wandb"])
    run_id = json.loads((tmp_path / "run" / "tracked_runs.json").read_text())["wandb"]
    time.sleep(1)  # W&B names its folders by the second
    run_training(*SHORT[2:], "SOLVER.MAX_ITER", 6, "SOLVER.WRITERS", ["json", "wandb"], resume=True)
    files = list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == 2
    deadline = time.monotonic() + 60  # W&B's own process writes them
    while not all(b"bbox/AP" in file.read_bytes() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_mlflow_itself_in_files(run_training, monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 would rather have a database
    run_training(*SHORT, "SOLVER.WRITERS", ["json", "mlflow"])
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("codetr_d2")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params["SOLVER.MAX_ITER"]) == ("run", "FINISHED", "4")
    expected = [(i, values["bbox/AP"]) for i, values in metrics_of(tmp_path / "run").items() if "bbox/AP" in values]
    assert [i for i, _ in expected] == [1, 4]
    assert [(x.step, x.value) for x in client.get_metric_history(run.info.run_id, "bbox/AP")] == expected
