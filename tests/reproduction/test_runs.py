"""Runs that are trained, gone on with, left alone or refused; without training anything."""

import json
import threading
from types import SimpleNamespace

import pytest

from codetr_d2.errors import InputError
from reproduction import runs
from reproduction.plans import PLANS, Run, paper_k
from reproduction.results import Results

RUN = PLANS["short"].runs[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of the run; ``commands`` lists what has been started."""
    commands = []

    def start(command, **options):
        commands.append(command[1:])
        return SimpleNamespace(returncode=len(commands) - 1 if "fail" in commands[-1] else 0)

    monkeypatch.setattr(runs.subprocess, "run", start)
    monkeypatch.setattr(runs, "commands", commands, raising=False)
    return tmp_path / RUN.name


def finish(folder):
    (folder / "model_final.pth").touch()
    (folder / "metrics.json").write_text(json.dumps({"iteration": 250, "bbox/AP": 50.0}))


def test_a_run_starts_goes_on_and_ends(folder):
    runs.train(RUN, folder, threads=1)
    [command] = runs.commands
    assert command[:3] == ["train_net.py", "--config-file", RUN.setting.config_file] and "--resume" not in command
    assert command[-2:] == ["OUTPUT_DIR", str(folder)] and "['atss', 'roi']" in command
    (folder / "config.yaml").touch()  # the training writes it first
    runs.train(RUN, folder, threads=1)
    assert "--resume" in runs.commands[1]
    finish(folder)
    runs.train(RUN, folder, threads=1)
    assert len(runs.commands) == 2
    assert (folder / "train.out").read_text().count("$ python train_net.py") == 2


def test_a_folder_of_other_options_is_refused(folder):
    runs.train(RUN, folder, threads=1)
    (folder / "config.yaml").touch()
    finish(folder)
    for other in (Run(RUN.setting, paper_k(3), 1), Run(RUN.setting, RUN.experiment, 2)):
        with pytest.raises(InputError, match=f"{folder} holds a training with other options.*--output"):
            runs.train(other, folder, threads=1)


def test_a_run_that_fails_names_its_log(tmp_path, folder):
    runs.run_command(["fine"], tmp_path / "log", threads=1)
    with pytest.raises(InputError, match=f"exit code 1.*{tmp_path / 'log'} says why"):
        runs.run_command(["fail"], tmp_path / "log", threads=1)


def test_all_runs_are_worked_on_some_at_a_time():
    both = threading.Barrier(2, timeout=20)
    seen = []

    def work(run):
        both.wait()  # would time out, were they one after the other
        seen.append(run)

    runs.run_all(PLANS["more"].runs, work, jobs=2)
    assert sorted(x.name for x in seen) == sorted(x.name for x in PLANS["more"].runs)


def test_after_a_failure_nothing_else_begins():
    seen = []

    def work(run):
        seen.append(run)
        raise InputError("no luck")

    with pytest.raises(InputError, match="no luck"):
        runs.run_all(PLANS["full"].runs, work, jobs=1)
    assert len(seen) <= 2


def test_a_file_that_holds_no_results(tmp_path):
    (tmp_path / "results.json").write_text('{"runs": 3}')
    with pytest.raises(InputError, match=r"results\.json holds no results"):
        Results.read(tmp_path / "results.json")
