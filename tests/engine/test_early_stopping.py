"""``TEST.EARLY_STOPPING_PATIENCE``: when a training ends, and what it leaves behind."""

import json
import math
import os

import pytest

from codetr_d2.engine import check_config, load_config
from codetr_d2.engine.trainer import CoDETRTrainer
from codetr_d2.errors import InputError

OPTIONS = ("SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 3, "TEST.EVAL_PERIOD", 2)


@pytest.fixture
def evaluations(monkeypatch):
    """A function (AP, ...): the training's evaluations give these. Returns a list that grows by each one's AP."""

    def give(*values):
        done, rest = [], iter(values)

        def test(cls, cfg, model):
            done.append(next(rest))
            return {"bbox": {"AP": done[-1]}}

        monkeypatch.setattr(CoDETRTrainer, "test", classmethod(test))
        return done

    return give


def reported(folder):
    """(iteration, AP) of each line of metrics.json that has one."""
    entries = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [(entry["iteration"], entry["bbox/AP"]) for entry in entries if "bbox/AP" in entry]


@pytest.mark.parametrize(
    "patience, values, last",
    [
        (1, [5, 4], 4),
        (1, [5, 5], 4),  # as good is not better
        (2, [5, 4, 6, 6, 5], 10),  # the third begins the count anew
        (2, [math.nan, math.nan], 4),
        (2, [5, math.nan, 4], 6),
        (2, [1, 2, 3, 4, 5, 6], 12),
        (9, [5, 4, 4, 4, 4, 4], 12),
        (0, [5, 4, 3, 2, 1, 0], 12),
    ],
)
def test_it_ends_after_so_many_evaluations_without_a_better_one(
    run_training, evaluations, tmp_path, patience, values, last
):
    done = evaluations(*values)
    trainer = run_training(*OPTIONS, "TEST.EARLY_STOPPING_PATIENCE", patience)
    assert trainer.iter == trainer.max_iter == last
    assert str(done) == str(values)  # none twice, and none missing
    folder = tmp_path / "run"
    assert {f"model_{last - 1:07d}.pth", "model_final.pth"} <= set(os.listdir(folder))
    assert (folder / "last_checkpoint").read_text() == f"model_{last - 1:07d}.pth"
    results = [None if math.isnan(x) else x for x in values]
    iterations = [*range(1, last, 2), last] if last < 12 else [1, 3, 5, 7, 9, 12]
    assert reported(folder) == list(zip(iterations, [*results, results[-1]]))
    ended_early = f"ends early, after {last} iterations" in (folder / "log.txt").read_text()
    assert ended_early == (last < 12)


def test_a_resumed_run_keeps_its_count(run_training, make_config, evaluations, tmp_path, assert_same_weights):
    opts = (*OPTIONS, "TEST.EARLY_STOPPING_PATIENCE", 3)
    evaluations(5, 4, 4, 4)
    assert run_training(*opts, "OUTPUT_DIR", tmp_path / "whole").iter == 8

    evaluations(5, 4, 4)
    trainer = CoDETRTrainer(make_config(*opts))
    run_step = trainer.run_step

    def run_step_until_interrupted():
        if trainer.iter == 7:
            raise KeyboardInterrupt
        run_step()

    trainer.run_step = run_step_until_interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    evaluations(4)
    resumed = run_training(*opts, resume=True)
    assert (resumed.start_iter, resumed.iter) == (6, 8)
    for name in ("model_0000007.pth", "model_best.pth", "model_final.pth"):
        assert_same_weights(tmp_path / "whole" / name, tmp_path / "run" / name)


def test_a_run_that_has_ended_early_goes_on_with_more_patience_alone(run_training, evaluations, tmp_path):
    evaluations(5, 4)
    assert run_training(*OPTIONS, "TEST.EARLY_STOPPING_PATIENCE", 1).iter == 4
    before = (tmp_path / "run" / "model_final.pth").read_bytes()

    done = evaluations(4)
    again = run_training(*OPTIONS, "TEST.EARLY_STOPPING_PATIENCE", 1, resume=True)
    assert (again.start_iter, again.iter, done) == (4, 4, [4])
    assert (tmp_path / "run" / "model_final.pth").read_bytes() == before

    evaluations(4, 4)
    assert run_training(*OPTIONS, "TEST.EARLY_STOPPING_PATIENCE", 3, resume=True).iter == 8


@pytest.mark.parametrize(
    "others", [("TEST.EVAL_PERIOD", 0), ("DATASETS.TEST", "()"), ("TEST.BEST_CHECKPOINT_METRIC", "")]
)
def test_it_needs_evaluations(config_file, others):
    cfg = load_config(str(config_file), ["TEST.EARLY_STOPPING_PATIENCE", "5", "TEST.EVAL_PERIOD", "2"])
    check_config(cfg)
    cfg.merge_from_list(list(others))
    with pytest.raises(InputError, match="TEST.EARLY_STOPPING_PATIENCE is 5, but nothing tells whether"):
        check_config(cfg)
    cfg.TEST.EARLY_STOPPING_PATIENCE = -1
    with pytest.raises(InputError, match="TEST.EARLY_STOPPING_PATIENCE is -1; it must be at least 0"):
        check_config(cfg)


@pytest.mark.slow
def test_all_processes_end_together(start_process, tmp_path):
    """The weights hardly move, so that no evaluation is better than the first; the results are the main process's."""
    opts = (*OPTIONS, "TEST.EARLY_STOPPING_PATIENCE", 1, "SOLVER.BASE_LR", 1e-12, "SOLVER.WEIGHT_DECAY", 0)
    process = start_process("--num-processes", 2, *opts)
    assert process.wait(timeout=300) == 0
    folder = tmp_path / "run"
    assert (folder / "last_checkpoint").read_text() == "model_0000003.pth"
    assert [iteration for iteration, _ in reported(folder)] == [1, 3, 4]
    for log in ("log.txt", "log.txt.rank1"):
        assert "ends early, after 4 iterations" in (folder / log).read_text()
