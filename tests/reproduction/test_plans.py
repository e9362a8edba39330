"""What the reproduction trains."""

import ast

import pytest

from codetr_d2.config.config_file import load_config
from reproduction.plans import ABLATIONS, BASE_AND_CO, DIGITS, HEADS, PLANS, paper_k

RUNS = [run for plan in PLANS.values() for run in plan.runs]


def config_of(run):
    return load_config(run.setting.config_file, [str(x) for x in run.opts])


def test_the_paper_s_order_of_heads():
    assert [len(paper_k(k).aux_heads) for k in (0, 1, 2, 3, 6)] == [0, 1, 2, 3, 6]
    assert set(paper_k(6).aux_heads) == set(HEADS) and paper_k(3).aux_heads == ("atss", "roi", "paa")
    assert paper_k(1) in ABLATIONS  # as the experiment with this head


@pytest.mark.parametrize("plan", PLANS)
def test_runs_have_places_of_their_own(plan):
    names = [run.name for run in PLANS[plan].runs]
    assert len(set(names)) == len(names)


def test_three_seeds_of_everything():
    for plan, count in (("full", len(ABLATIONS)), ("more", 2 * len(BASE_AND_CO))):
        seeds = [run.seed for run in PLANS[plan].runs]
        assert all(seeds.count(seed) == count for seed in (1, 2, 3)) and len(seeds) == 3 * count


@pytest.mark.parametrize("run", [run for run in RUNS if run.seed == 1], ids=lambda run: run.name)
def test_experiments_differ_in_what_they_say_alone(run):
    cfg = config_of(run)
    plain = config_of(type(run)(run.setting, paper_k(0), 1))
    assert list(cfg.MODEL.CODETR.AUX_HEADS) == list(run.experiment.aux_heads) and cfg.SEED == 1
    assert cfg.SOLVER == plain.SOLVER and cfg.DATASETS == plain.DATASETS and cfg.INPUT == plain.INPUT
    assert cfg.SOLVER.MAX_ITER < load_config(run.setting.config_file).SOLVER.MAX_ITER
    changed = {"MODEL.CODETR.AUX_HEADS", *run.experiment.opts[::2]}
    for key, value in zip(run.experiment.opts[::2], run.experiment.opts[1::2]):
        node = cfg
        for part in key.split("."):
            node = node[part]
        assert node == value
    for key in ("LAMBDA1", "LAMBDA2", "LOSS_CLS", "LOSS_BOX", "LOSS_GIOU", "EVAL_HEAD"):
        if f"MODEL.CODETR.{key}" not in changed:
            assert cfg.MODEL.CODETR[key] == plain.MODEL.CODETR[key]


def test_a_branch_alone_has_no_detector_to_train():
    [run] = [x for x in PLANS["full"].runs if x.experiment.name == "atss_alone" and x.seed == 2]
    node = config_of(run).MODEL.CODETR
    assert node.LOSS_CLS == node.LOSS_BOX == node.LOSS_GIOU == 0 and not node.POSITIVE_QUERIES.ENABLED
    assert node.EVAL_HEAD == "atss" and run.name == "digits/atss_alone/seed2"


def test_lists_reach_the_command_line_as_they_are():
    opts = dict(zip(PLANS["short"].runs[1].opts[::2], PLANS["short"].runs[1].opts[1::2]))
    assert ast.literal_eval(str(opts["MODEL.CODETR.AUX_HEADS"])) == ["atss", "roi"]
    assert PLANS["short"].runs[1].setting is DIGITS
