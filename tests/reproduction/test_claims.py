"""What is said of the paper's claims, on made-up numbers whose answer is known."""

import itertools

import numpy as np
import pytest

from reproduction.claims import CLAIMS, Comparison, Outcome, mean_and_spread
from reproduction.page import page_text, write_page
from reproduction.plans import DIGITS, PLANS
from reproduction.results import Results, RunResult


def test_mean_and_sample_standard_deviation():
    assert mean_and_spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert mean_and_spread([1.26]) == "1.3"


@pytest.mark.parametrize(
    "first, second, outcome",
    [
        ([3, 4, 5], [0, 1, 2], Outcome.HOLDS),
        ([0, 1, 2], [3, 4, 5], Outcome.REVERSED),
        ([2, 4, 5], [0, 1, 3], Outcome.UNCLEAR),
        ([2, 4, 5], [0, 1, 2], Outcome.UNCLEAR),  # equal is not above
        ([9], [1], Outcome.ONE_SEED),
        ([9, 8], [1], Outcome.ONE_SEED),
    ],
)
def test_outcomes(first, second, outcome):
    assert Comparison("", first, second).outcome == outcome


def test_chance_lets_a_claim_hold_once_in_twenty():
    """Of all ways to deal six values to two sides of three."""
    held = [
        Comparison("", chosen, [x for x in range(6) if x not in chosen]).outcome == Outcome.HOLDS
        for chosen in itertools.combinations(range(6), 3)
    ]
    assert sum(held) / len(held) == 1 / 20


def test_so_many_seeds_would_show_the_difference():
    """Simulated: with that many seeds, a one-sided test at 5 percent finds it in about four cases of five."""
    comparison = Comparison("", [0.5 + x for x in (-1.0, 0.0, 1.0)], [-1.0, 0.0, 1.0])
    number = comparison.seeds_needed
    generator = np.random.default_rng(0)
    means = generator.normal(0, 1, (2, 20_000, number)).mean(axis=2)
    found = (means[0] + 0.5 - means[1]) / (2 / number) ** 0.5 > 1.645
    assert found.mean() == pytest.approx(0.8, abs=0.02)
    assert Comparison("", [0, 1], [1, 0]).seeds_needed is None


def result(experiment, seed, ap, heads=(), **fields):
    """A run in which all of the paper's claims hold the better, the higher its AP."""
    branches = {head: ap + 5 for head in heads}
    queries = {"positives per object": 9.0, "positive distance": 0.01, "negative distance": 0.03 + 0.001 * seed}
    values = {
        "ap_by_iteration": [(50, ap / 2), (100, ap + 0.1 * seed)],
        "instability": [(50, 100 - ap), (100, (100 - ap) / 2 - 0.01 * seed)],
        "discriminability": {"backbone": 0.5, "encoder": ap / 100 + 0.001 * seed},
        "attention": ap / 100 + 0.001 * seed,
        "conflict": {"detector": {head: 0.01 * len(heads) + 0.0001 * seed for head in heads}} if heads else {},
        "queries": {head: queries for head in heads},
        "branches": branches,
    }
    return RunResult(DIGITS.name, experiment, seed, "a machine", **{**values, **fields})


APS = {
    **{"k0": 40, "roi": 45, "atss": 45, "paa": 45, "retinanet": 45, "fcos": 45, "gfl": 45, "k2": 60, "k3": 55},
    **{"k6": 50, "k2_heads_only": 50, "k2_queries_only": 48, "atss_alone": 40, "roi_alone": 40},
}


@pytest.fixture
def results():
    heads = {run.experiment.name: run.experiment.aux_heads for run in PLANS["full"].runs}
    return Results([result(name, seed, ap, heads[name]) for name, ap in APS.items() for seed in (1, 2, 3)])


def test_numbers_where_every_claim_holds(results):
    claims = [build(results) for build in CLAIMS]
    assert len(claims) == 10 and [x.verdict for x in claims] == [Outcome.HOLDS] * 10
    assert [len(x.comparisons) for x in claims] == [1, 6, 4, 2, 3, 1, 1, 2, 4, 6]


def test_numbers_where_the_first_three_do_not(results):
    for run in results.runs:
        if run.experiment == "k0":
            run.ap_by_iteration = [(100, 52.0 + 10 * (run.seed - 1))]  # 52, 62, 72: one head is behind, both unclear
    co_training, one_head, parts, *_ = (build(results) for build in CLAIMS)
    assert co_training.verdict == Outcome.UNCLEAR and co_training.comparisons[0].seeds_needed is None
    assert one_head.verdict == Outcome.REVERSED
    assert parts.verdict == "is the other way round in 2 of 4 comparisons, holds in 2 of 4 comparisons"


def test_the_page(results, tmp_path):
    cost = {"model": "K = 0", "parameters (M)": 4.0, "at inference (M)": 3.9, "GFLOPs": 0.5}
    text = page_text(results, [cost], "numbers", lambda file: file == "ap.png")
    assert text.count("**Holds**") == 30  # every comparison
    assert "60.2 ± 0.1 against 40.2 ± 0.1 (+20.0)" in text and "| K = 2: ATSS + Faster R-CNN" in text
    assert "(numbers/ap.png)" in text and "stability.png" not in text and "0.500 G" in text
    assert "SOLVER.MAX_ITER 250" in text and "measured on a machine." in text
    results.runs[0].machine = "another"
    assert "measured on a machine; another." in page_text(results, [], "", lambda file: False)
    write_page(tmp_path / "docs" / "page.md", results, [])
    assert "# The paper in miniature" in (tmp_path / "docs" / "page.md").read_text()


def test_a_page_of_few_runs():
    text = page_text(Results([result("k0", 1, 40), result("k2", 1, 60, ("atss", "roi"))]), [], "", lambda file: False)
    assert "| With K = 2 a detector is ahead" in text and Outcome.ONE_SEED in text
    assert "**Holds**" not in text and text.count("**One seed: no verdict**") == 7


def test_results_of_other_settings_stay(results, tmp_path):
    other = RunResult("nuclei", "k0", 1, "another", [(1, 30.0)])
    file = tmp_path / "results.json"
    Results([*results.runs, other]).write(file)
    kept = Results.read(file).updated([result("k0", 1, 99)])
    assert sorted((x.setting, x.ap) for x in kept.runs) == [("digits", 99.1), ("nuclei", 30.0)]
    assert Results.read(tmp_path / "none.json").runs == []
