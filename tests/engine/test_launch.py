import json
import os
import signal
import subprocess
import tempfile
import time

import pytest
from detectron2.utils import comm

import train_net
from codetr_d2.engine import run_processes
from codetr_d2.errors import InputError
from codetr_d2_programs import train

pytestmark = pytest.mark.slow


def finish(process, code=0):
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == code, output
    return output


def options(**changes):
    return [str(x) for item in changes.items() for x in (item[0].replace("__", "."), item[1])]


def raise_input_error(text):
    raise InputError(text)


def raise_other_error():
    raise RuntimeError("a fault of our own")


def kill_the_second():
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def wait_for(path, process):
    deadline = time.monotonic() + 100
    while not path.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)


def listed(*command):
    """The numbers that a command prints."""
    result = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    return [int(x) for x in result.stdout.split()]


def test_one_process_is_this_one():
    with pytest.raises(InputError, match="^first$"):
        run_processes(raise_input_error, 1, device="cpu", args=("first",))


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "--config-file is missing"),
        (["--config-file", "none.yaml"], "none.yaml: cannot read"),
        (["--config-file", "CONFIG", "--num-gpus", "2"], "use --num-processes 2"),
        (["--config-file", "CONFIG", "--num-processes", "0"], "must be at least 1"),
        (["--config-file", "CONFIG", "--num-machines", "2"], "--num-machines needs --dist-url"),
        (["--config-file", "CONFIG", "--num-processes", "3"], "IMS_PER_BATCH is 4"),
        (["--config-file", "CONFIG", "DATASETS.TRAIN", "('tiny_none',)"], "'tiny_none'"),
        (["--config-file", "CONFIG", "--eval-only", "MODEL.WEIGHTS", "none.pth"], "there is no file none.pth"),
    ],
)
def test_mistakes_of_the_user_are_one_line(args, message, config_file, capsys):
    with pytest.raises(SystemExit) as exit:
        train_net.main([str(config_file) if x == "CONFIG" else x for x in args])
    last = capsys.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and len(last) == 1 and last[0].startswith("error: ") and message in last[0]


def test_an_interrupted_run_says_how_to_go_on(config_file, capsys, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run_processes", interrupt)
    with pytest.raises(SystemExit) as exit:
        train_net.main(["--config-file", str(config_file)])
    assert exit.value.code == 130 and "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "num_processes, target, signum",
    [
        (1, "command", signal.SIGTERM),
        (2, "command", signal.SIGTERM),
        (2, "first process", signal.SIGINT),
        (2, "group", signal.SIGINT),  # as Ctrl-C in a terminal
    ],
)
def test_one_signal_ends_the_job(num_processes, target, signum, start_process, tmp_path):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    changes = options(SOLVER__MAX_ITER=100_000, SOLVER__CHECKPOINT_PERIOD=30)
    job = start_process("--num-processes", num_processes, *changes, **pipes)
    wait_for(tmp_path / "run" / "last_checkpoint", job)
    if target == "group":
        os.killpg(job.pid, signum)
    elif target == "command":
        job.send_signal(signum)
    else:
        os.kill(listed("pgrep", "-P", job.pid, "-f", "spawn_main")[0], signum)
    output = finish(job, 128 + signum).splitlines()
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[signum]
    assert [line for line in output if line.startswith(word)] == [output[-1]] and "--resume" in output[-1]
    assert not [line for line in output if "Traceback" in line]
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    assert entries[-1]["iteration"] >= 29  # the last steps too, though 20 are written at once
    deadline = time.monotonic() + 20
    while listed("pgrep", "-g", job.pid):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.1)


def test_a_killed_process_is_one_line():
    with pytest.raises(InputError, match="^process 1 was ended .SIGKILL.; .* memory"):
        run_processes(kill_the_second, 2, device="cpu")


def test_a_killed_run_resumes_to_the_same_end(start_process, config_file, tmp_path, assert_same_weights, capsys):
    common = options(
        SOLVER__MAX_ITER=60, SOLVER__CHECKPOINT_PERIOD=5, DATALOADER__NUM_WORKERS=2, SOLVER__EMA__ENABLED=True
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    whole = start_process(*common, "OUTPUT_DIR", tmp_path / "whole", **pipes)

    folder = tmp_path / "run"
    killed = start_process(*common, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(folder / "model_0000019.pth", killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (folder / "model_final.pth").exists()

    with pytest.raises(SystemExit) as exit:  # without --resume nothing is overwritten
        train_net.main(["--config-file", str(config_file), *common])
    assert exit.value.code == 2 and "error: OUTPUT_DIR" in capsys.readouterr().err
    finish(whole)
    finish(start_process("--resume", *common, **pipes))
    for name in ("model_0000059.pth", "model_final.pth"):
        assert_same_weights(tmp_path / "whole" / name, folder / name)
    logs = [
        [json.loads(line)["iteration"] for line in (f / "metrics.json").read_text().splitlines()]
        for f in (tmp_path / "whole", folder)
    ]
    assert logs[0] == logs[1]
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_two_processes_train_and_evaluate_like_one(start_process, tmp_path, assert_same_weights):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    common = options(
        MODEL__CODETR__ENCODER__DROPOUT=0.0, SOLVER__MAX_ITER=8, TEST__EVAL_PERIOD=4, SOLVER__EMA__ENABLED=True
    )
    one = start_process(*common, "OUTPUT_DIR", tmp_path / "one", **pipes)
    finish(start_process("--num-processes", 2, *common, "OUTPUT_DIR", tmp_path / "two", **pipes))
    finish(one)
    assert_same_weights(tmp_path / "one" / "model_final.pth", tmp_path / "two" / "model_final.pth", tolerance=1e-5)
    assert_same_weights(tmp_path / "one" / "model_0000007.pth", tmp_path / "two" / "model_0000007.pth", tolerance=1e-5)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.json").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [entry["iteration"] for entry in one] == [entry["iteration"] for entry in two]
    for a, b in zip(one, two):
        for key in a.keys() & {"bbox/AP", "bbox/AP50", "total_loss", "loss_box", "grad_norm"}:
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-3)
    assert "bbox/AP" in one[-1]


def test_mistakes_of_the_user_reach_the_first_process_and_other_errors_keep_their_traceback(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(InputError, match="^first$"):
        run_processes(raise_input_error, 2, device="cpu", args=("first",))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3" and not os.listdir(tmp_path)
    with pytest.raises(Exception, match="(?s)Traceback.*in raise_other_error.*a fault of our own"):
        run_processes(raise_other_error, 2, device="cpu")
