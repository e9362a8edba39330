"""The paper's claims, each with what the runs here say about it."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .plans import ABLATIONS, DIGITS, DINO, HEADS, NUCLEI
from .results import Results, RunResult

__all__ = ["CLAIMS", "Claim", "Comparison", "Outcome", "mean_and_spread"]

LABELS = {x.name: x.label for x in ABLATIONS}
# Standard normal quantiles: a one-sided test at 5 percent that finds a true difference in 4 of 5 cases.
QUANTILES = 1.645 + 0.842


class Outcome:
    """What a comparison says."""

    HOLDS = "holds"
    UNCLEAR = "does not show"
    REVERSED = "is the other way round"
    ONE_SEED = "one seed: no verdict"


def mean_and_spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and sample standard deviation, as text."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


@dataclass(frozen=True)
class Comparison:
    """Whether one quantity is larger than another, each measured with several seeds.

    It holds where every seed of the first is above every seed of the second: with three seeds of each, chance does that
    once in twenty.

    Attributes:
        first, second: the values; the claim is that the first are larger.
        what: is compared, as text.
        digits: after the point.
    """

    what: str
    first: Sequence[float]
    second: Sequence[float]
    digits: int = 1

    @property
    def difference(self) -> float:
        return statistics.mean(self.first) - statistics.mean(self.second)

    @property
    def outcome(self) -> str:
        if min(len(self.first), len(self.second)) < 2:
            return Outcome.ONE_SEED
        if min(self.first) > max(self.second):
            return Outcome.HOLDS
        return Outcome.REVERSED if max(self.first) < min(self.second) else Outcome.UNCLEAR

    @property
    def seeds_needed(self) -> int | None:
        """How many seeds of each side would tell a difference of this size in four cases of five, at 5 percent.

        None where the difference found is none, or not in the claimed direction.
        """
        if self.difference <= 0:
            return None
        variance = (statistics.variance(self.first) + statistics.variance(self.second)) / 2
        return max(2, math.ceil(2 * variance * (QUANTILES / self.difference) ** 2))

    def __str__(self) -> str:
        sides = " against ".join(mean_and_spread(x, self.digits) for x in (self.first, self.second))
        text = f"{self.what}: {sides} ({self.difference:+.{self.digits}f}). **{self.outcome.capitalize()}**"
        if self.outcome != Outcome.UNCLEAR:
            return f"{text}."
        if self.seeds_needed is None:
            return (
                f"{text}: the ranges overlap, and the means are not on the claim's side. More seeds would hardly help."
            )
        needed = f"about {self.seeds_needed} seeds of each"
        return (
            f"{text}: the ranges overlap. It takes {needed} to tell so small a difference, or a scale that widens it."
        )


@dataclass
class Claim:
    """A section of the page.

    Attributes:
        title: the claim, as a sentence.
        rows: of its table.
        comparisons: what decides on it.
        pictures: (file name, what it shows).
        notes: sentences that belong to the numbers.
    """

    title: str
    rows: list[dict]
    comparisons: list[Comparison]
    pictures: Sequence[tuple[str, str]] = ()
    notes: str = ""

    @property
    def verdict(self) -> str:
        """In a few words."""
        outcomes = [x.outcome for x in self.comparisons]
        if len(set(outcomes)) == 1:
            return outcomes[0]
        counts = {x: outcomes.count(x) for x in dict.fromkeys(outcomes)}
        return ", ".join(f"{outcome} in {n} of {len(outcomes)} comparisons" for outcome, n in counts.items())


def _ap(run: RunResult) -> float:
    return run.ap


def _rows(results: Results, names: Sequence[str], value: Callable, paper: dict[str, str], what: str, digits=1):
    """A row for each experiment that has run."""
    rows = []
    for name in names:
        if values := results.values(DIGITS.name, name, value):
            row = {"trained": LABELS[name], what: mean_and_spread(values, digits)}
            row["each seed"] = ", ".join(f"{x:.{digits}f}" for x in values)
            rows.append(row | ({"the paper": paper.get(name, "")} if paper else {}))
    return rows


def _compare(results: Results, what: str, first: str, second: str, value: Callable = _ap, digits=1) -> list[Comparison]:
    """The comparison of two experiments, where both have run."""
    a, b = (results.values(DIGITS.name, name, value) for name in (first, second))
    return [Comparison(what, a, b, digits)] if a and b else []


def co_training(results: Results) -> Claim:
    rows, comparisons = [], []
    for setting, paper in ((DIGITS, "47.1 to 49.5 (12 epochs)"), (DINO, "49.4 to 51.2"), (NUCLEI, "")):
        plain, co = (results.values(setting.name, name, _ap) for name in ("k0", "k2"))
        if plain and co:
            row = {"": setting.title, "K = 0": mean_and_spread(plain), "K = 2": mean_and_spread(co), "the paper": paper}
            rows.append(row)
            comparisons.append(Comparison(setting.title, co, plain))
    return Claim(
        "With K = 2 a detector is ahead of the plain one after equal iterations",
        rows,
        comparisons,
        [("ap.png", "Box AP of every run"), ("ap_by_iteration.png", "Box AP during the training")],
    )


def one_head(results: Results) -> Claim:
    paper = {"k0": "43.3", "retinanet": "46.1", "roi": "46.3", "fcos": "46.5", "paa": "46.5", "gfl": "46.5"}
    paper["atss"] = "46.8"
    comparisons = [y for x in HEADS for y in _compare(results, LABELS[x], x, "k0")]
    rows = _rows(results, ["k0", *HEADS], _ap, paper, "box AP")
    return Claim("One auxiliary head is a gain, whichever it is", rows, comparisons, notes="The paper: 36 epochs.")


def parts(results: Results) -> Claim:
    names = {"k0": "37.1", "k2_heads_only": "41.6", "k2_queries_only": "40.5", "k2": "42.3"}
    comparisons = [
        *_compare(results, "Auxiliary heads against none", "k2_heads_only", "k0"),
        *_compare(results, "Positive queries against none", "k2_queries_only", "k0"),
        *_compare(results, "Both against auxiliary heads alone", "k2", "k2_heads_only"),
        *_compare(results, "Both against positive queries alone", "k2", "k2_queries_only"),
    ]
    return Claim(
        "The parts add up: both are ahead of each, each is ahead of none",
        _rows(results, list(names), _ap, names, "box AP"),
        comparisons,
        notes="The paper: a plain Deformable-DETR, 12 epochs.",
    )


def number_of_heads(results: Results) -> Claim:
    paper = {"k0": "47.1", "atss": "48.7", "k2": "49.5", "k3": "49.5", "k6": "48.9"}
    return Claim(
        "More heads than two do not help: six are behind",
        _rows(results, list(paper), _ap, paper, "box AP"),
        [
            *_compare(results, "K = 2 against K = 6", "k2", "k6"),
            *_compare(results, "K = 3 against K = 6", "k3", "k6"),
        ],
        notes="The paper: 12 epochs; K = 2 and K = 3 are level there.",
    )


def conflict(results: Results) -> Claim:
    def value(run: RunResult) -> float:
        return run.mean_conflict

    names, paper = ["atss", "k2", "k3", "k6"], {"k2": "0.0059 to 0.0085 for each pair"}
    pairs = zip(names, names[1:])
    comparisons = [y for a, b in pairs for y in _compare(results, f"{_k(b)} against {_k(a)}", b, a, value, digits=4)]
    return Claim(
        "The conflict between heads grows with their number",
        _rows(results, names, value, paper, "mean S_ij, in nats", digits=4),
        comparisons,
        [("conflict.png", "S_ij of the first seed's models")],
        "The paper does not say how a Grad-CAM map becomes a distribution: here by a softmax of its values over the "
        "largest of them.",
    )


def _k(name: str) -> str:
    return LABELS[name].partition(":")[0]


def encoder(results: Results) -> Claim:
    def value(run: RunResult) -> float:
        return run.discriminability["encoder"]

    names = ["k0", *HEADS, "k2_heads_only", "k2_queries_only", "k2", "k3", "k6"]
    rows = _rows(results, names, value, {}, "area, encoder's output", digits=3)
    for row, name in zip(rows, [x for x in names if results.of(DIGITS.name, x)]):
        before = results.values(DIGITS.name, name, lambda run: run.discriminability["backbone"])
        row["area, what the encoder reads"] = mean_and_spread(before, 3)
    return Claim(
        "The encoder's features tell objects from background better",
        rows,
        _compare(results, "K = 2 against K = 0, the encoder's output", "k2", "k0", value, digits=3),
        [
            ("discriminability.png", "IoF-IoB curves of the first seed's models"),
            ("discriminability_maps.png", "Discriminability scores on the first pictures"),
        ],
        "The area under the IoF-IoB curve (eq. 8) is 0.5 for chance, 1 for perfect; below 0.5 the background has the "
        "larger norms. The encoder ends in a LayerNorm: the norms of its output differ by about 1 percent, and the "
        "learned scale of the channels decides which ones are larger. The paper has curves and no numbers.",
    )


def cross_attention(results: Results) -> Claim:
    names = ["k0", *HEADS, "k2_heads_only", "k2_queries_only", "k2", "k3", "k6"]

    def value(run: RunResult) -> float:
        return run.attention

    return Claim(
        "The decoder's cross-attention tells objects from background better",
        _rows(results, names, value, {}, "area", digits=3),
        _compare(results, "K = 2 against K = 0", "k2", "k0", value, digits=3),
        [
            ("attention.png", "IoF-IoB curves of the cross-attention, the first seed's models"),
            ("attention_maps.png", "Attention scores on the first pictures"),
            ("attention_queries.png", "Where the best queries look"),
        ],
        "The paper has curves and no numbers.",
    )


def stability(results: Results) -> Claim:
    names = ["k0", *HEADS, "k2_heads_only", "k2_queries_only", "k2", "k3", "k6"]

    def value(run: RunResult) -> float:
        return run.mean_instability

    def last(run: RunResult) -> float:
        return run.instability[-1][1]

    rows = _rows(results, names, value, {}, "mean IS", digits=2)
    for row, name in zip(rows, [x for x in names if results.of(DIGITS.name, x)]):
        row["IS of the last evaluation"] = mean_and_spread(results.values(DIGITS.name, name, last), 2)
    return Claim(
        "The matching is more stable",
        rows,
        [
            *_compare(results, "K = 0 above K = 2, mean over the training", "k0", "k2", value, digits=2),
            *_compare(results, "K = 0 above K = 2, last evaluation", "k0", "k2", last, digits=2),
        ],
        [("stability.png", "Instability of the matching during the training")],
        "IS is the number of queries of an image that changed their object since the evaluation before, 50 iterations "
        "ago. The paper has a curve and no numbers.",
    )


def branches(results: Results) -> Claim:
    rows, comparisons = [], []
    paper = {"atss": ("46.8", "47.4", "48.0"), "roi": ("45.9", "", "46.7")}
    for head, title in HEADS.items():
        row = {"head": title}
        for column, name, published in zip(
            ("alone", "K = 1", "K = 2", "K = 3", "K = 6"),
            (f"{head}_alone", head, "k2", "k3", "k6"),
            (*paper.get(head, ("", "", "")), "", ""),
        ):
            values = [x.branches[head] for x in results.of(DIGITS.name, name) if head in x.branches]
            row[column] = mean_and_spread(values) if values else ""
            row[column] += f" (the paper: {published})" if published else ""
        if any(row[x] for x in ("K = 1", "K = 2")):
            rows.append(row)
    for head in paper:
        alone, one, two = (
            [x.branches[head] for x in results.of(DIGITS.name, name)] for name in (f"{head}_alone", head, "k2")
        )
        for what, values in (("trained with the detector (K = 1)", one), ("in K = 2", two)):
            if alone and values:
                comparisons.append(Comparison(f"{HEADS[head]} {what} against {HEADS[head]} alone", values, alone))
    return Claim(
        "The auxiliary branches become better too",
        rows,
        comparisons,
        [("branches.png", "AP of every branch, the first seed's models")],
        "Box AP of the branch with NMS. *Alone* is backbone, encoder and this head, trained without the detector; the "
        "paper's is the head's own detector.",
    )


def distances(results: Results) -> Claim:
    rows, comparisons = [], []
    counts = {"roi": "18.7", "atss": "8.8"}
    for head, title in HEADS.items():
        runs = results.of(DIGITS.name, head) or results.of(DIGITS.name, "k2")
        found = [x.queries[head] for x in runs if head in x.queries]
        if found:
            positive, negative = ([x[f"{sign} distance"] for x in found] for sign in ("positive", "negative"))
            row = {"head": title, "positives": mean_and_spread(positive, 4), "negatives": mean_and_spread(negative, 4)}
            per_object = [x["positives per object"] for x in found]
            rows.append(
                row | {"positives for an object": mean_and_spread(per_object), "the paper's": counts.get(head, "")}
            )
            comparisons.append(Comparison(f"{title}, negatives against positives", negative, positive, 4))
    return Claim(
        "Positive queries are nearer to the original queries than negative ones",
        rows,
        comparisons,
        [
            ("queries.png", "Customised queries of K = 2, the first seed's model"),
            ("queries_distance.png", "Their distance from the original queries"),
        ],
        "Mean distance of centres from the nearest original query, as a share of the picture's diagonal. How the paper "
        "measures it is not given. Of the models with this head alone, where there are some.",
    )


# In the order of the page.
CLAIMS = (
    co_training,
    one_head,
    parts,
    number_of_heads,
    conflict,
    encoder,
    cross_attention,
    stability,
    branches,
    distances,
)
