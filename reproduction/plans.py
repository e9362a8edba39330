"""What is trained: settings (data, detector, schedule), experiments (what is changed), and plans made of both."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["ABLATIONS", "DINO", "DIGITS", "HEADS", "NUCLEI", "PLANS", "Experiment", "Plan", "Run", "Setting", "paper_k"]

HEADS = {"roi": "Faster R-CNN", "atss": "ATSS", "paa": "PAA", "retinanet": "RetinaNet", "fcos": "FCOS", "gfl": "GFL"}
BRANCH_ALONE = ("MODEL.CODETR.LOSS_CLS", 0.0, "MODEL.CODETR.LOSS_BOX", 0.0, "MODEL.CODETR.LOSS_GIOU", 0.0)
NO_POSITIVE_QUERIES = ("MODEL.CODETR.POSITIVE_QUERIES.ENABLED", False)


@dataclass(frozen=True)
class Setting:
    """Data, detector and schedule.

    Attributes:
        name: in paths and files.
        title: on the page.
        config_file: in configs/.
        prepare: the script that writes the dataset, and its folder.
        opts: key, value, ... of the config. The schedule is the same for all experiments.
    """

    name: str
    title: str
    config_file: str
    prepare: tuple[str, str]
    opts: tuple


@dataclass(frozen=True)
class Experiment:
    """What is changed in a setting.

    Attributes:
        name: in paths and files.
        label: in tables and pictures.
        aux_heads: MODEL.CODETR.AUX_HEADS.
        opts: further key, value, ... of the config.
        branch: the auxiliary head that is trained without a detector; "" where there is one.
    """

    name: str
    label: str
    aux_heads: tuple[str, ...] = ()
    opts: tuple = ()
    branch: str = ""


@dataclass(frozen=True)
class Run:
    """One training."""

    setting: Setting
    experiment: Experiment
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting.name}/{self.experiment.name}/seed{self.seed}"

    @property
    def opts(self) -> list:
        """key, value, ... that follow the config file, but OUTPUT_DIR."""
        opts = [*self.setting.opts, "SEED", self.seed, "MODEL.CODETR.AUX_HEADS", list(self.experiment.aux_heads)]
        return [*opts, *self.experiment.opts]


@dataclass(frozen=True)
class Plan:
    """Runs, and where their page is written.

    Attributes:
        runs: by rising seed, so that one seed of all is there first.
        page: a Markdown file; pictures and numbers come into the folder of the same name beside it.
    """

    runs: tuple[Run, ...]
    page: Path


def paper_k(number: int) -> Experiment:
    """The paper's choice of so many heads (table of K): ATSS, then Faster R-CNN, PAA, and the other three."""
    heads = {0: [], 1: ["atss"], 2: ["atss", "roi"], 3: ["atss", "roi", "paa"]}.get(number)
    heads = ["atss", "roi", "paa", "retinanet", "fcos", "gfl"] if heads is None else heads
    label = "six heads" if number == 6 else " + ".join(HEADS[x] for x in heads) or "no auxiliary head"
    # One head is an experiment of its own, whichever it is.
    return Experiment(heads[0] if number == 1 else f"k{number}", f"K = {number}: {label}", tuple(heads))


def one_head(name: str) -> Experiment:
    return Experiment(name, f"K = 1: {HEADS[name]}", (name,))


def branch_alone(name: str) -> Experiment:
    """Backbone, encoder and one auxiliary head, trained without the detector."""
    opts = (*BRANCH_ALONE, *NO_POSITIVE_QUERIES, "MODEL.CODETR.EVAL_HEAD", name, "TEST.STABILITY_IMAGES", 0)
    return Experiment(f"{name}_alone", f"{HEADS[name]} alone, no detector", (name,), opts, branch=name)


def schedule(iterations: int, period: int, images: int) -> tuple:
    """Options of a training that is shorter than a quick start's, evaluated every ``period`` iterations."""
    return (
        *("SOLVER.MAX_ITER", iterations, "SOLVER.STEPS", [iterations * 4 // 5]),
        *("SOLVER.WARMUP_ITERS", iterations // 10, "SOLVER.CHECKPOINT_PERIOD", iterations // 2),
        *("TEST.EVAL_PERIOD", period, "TEST.STABILITY_IMAGES", images, "TEST.BEST_CHECKPOINT_METRIC", ""),
    )


DIGITS = Setting(
    "digits",
    "Co-Deformable-DETR on handwritten digits",
    "configs/quick_start/co_deformable_detr_efficientnet_lite0_digits.yaml",
    ("tools/prepare/prepare_digits.py", "datasets/digits"),
    schedule(iterations=250, period=50, images=80),
)
DINO = Setting(
    "digits_co_dino",
    "Co-DINO on handwritten digits",
    "configs/quick_start/co_dino_efficientnet_lite0_digits.yaml",
    DIGITS.prepare,
    DIGITS.opts,
)
NUCLEI = Setting(
    "nuclei",
    "Co-Deformable-DETR on cell nuclei",
    "configs/quick_start/co_deformable_detr_efficientnet_lite0_nuclei.yaml",
    ("tools/prepare/prepare_nuclei.py", "datasets/nuclei"),
    # Boxes alone: without the ROI head nothing would learn the masks.
    (*schedule(iterations=300, period=50, images=4), "MODEL.MASK_ON", False),
)

HEADS_ALONE = Experiment("k2_heads_only", "K = 2, auxiliary heads only", ("atss", "roi"), NO_POSITIVE_QUERIES)
QUERIES_ALONE = Experiment(
    "k2_queries_only", "K = 2, positive queries only", ("atss", "roi"), ("MODEL.CODETR.LAMBDA2", 0.0)
)
ABLATIONS = (
    paper_k(0),
    *(one_head(name) for name in HEADS),
    paper_k(2),
    HEADS_ALONE,
    QUERIES_ALONE,
    paper_k(3),
    paper_k(6),
    branch_alone("atss"),
    branch_alone("roi"),
)
BASE_AND_CO = (paper_k(0), paper_k(2))


def runs(settings: tuple[Setting, ...], experiments: tuple[Experiment, ...], num_seeds: int) -> tuple[Run, ...]:
    seeds = range(1, num_seeds + 1)
    return tuple(Run(x, experiment, seed) for seed in seeds for x in settings for experiment in experiments)


FULL = runs((DIGITS,), ABLATIONS, num_seeds=3)
MORE = runs((DINO, NUCLEI), BASE_AND_CO, num_seeds=3)
PAGE = Path("docs/reproduction.md")
PLANS = {
    "full": Plan(FULL, PAGE),
    "short": Plan(runs((DIGITS,), BASE_AND_CO, num_seeds=1), Path("output/reproduction_short.md")),
    "more": Plan(MORE, PAGE),
}
