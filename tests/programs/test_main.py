"""``codetr_d2``: what stands before its commands."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from codetr_d2_programs import __main__ as command_line

ROOT = Path(__file__).parents[2]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["codetr_d2", *arguments])
    command_line.main()


def test_help_lists_every_command_without_loading_torch():
    code = "import sys; sys.modules['torch'] = None; from codetr_d2_programs.__main__ import main; main()"
    command = [sys.executable, "-c", code, "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    listed = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")]
    assert set(command_line.COMMANDS) <= set(listed)


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_help_of_a_command_is_under_its_name(command, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, command, "--help")
    assert not stop.value.code and f"usage: codetr_d2 {command} [-h]" in capsys.readouterr().out
    assert importlib.import_module(f"codetr_d2_programs.{command_line.COMMANDS[command][0]}").__doc__


def test_arguments_are_those_of_the_command(monkeypatch, capsys):
    from codetr_d2_programs import train

    received = []
    monkeypatch.setattr(train, "main", lambda: received.append(sys.argv))
    run(monkeypatch, "evaluate", "--config-file", "a.yaml", "--num-gpus", "2", "MODEL.WEIGHTS", "b.pth")
    [(name, *arguments)] = received
    args = train.build_parser().parse_args(arguments)
    assert name == "codetr_d2 evaluate" and args.eval_only and args.config_file == "a.yaml" and args.num_gpus == 2
    assert args.opts == ["MODEL.WEIGHTS", "b.pth"]


def test_an_unknown_command_is_named(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "test")
    assert stop.value.code == 2 and "'test'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["torch", "detectron2"])
def test_what_is_not_installed_is_one_line(name, monkeypatch, capsys):
    def fail(module):
        raise ModuleNotFoundError(f"codetr_d2 needs {name}", name=name)

    monkeypatch.setattr(command_line.importlib, "import_module", fail)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "train")
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: codetr_d2 needs {name}\n"
