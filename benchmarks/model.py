"""``python -m benchmarks inference`` and ``train``: whole models, each side of a comparison in a process of its own."""

import argparse
import statistics
import time
import traceback
from contextlib import nullcontext
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from codetr_d2.checkpoint.checkpointer import CoDETRCheckpointer
from codetr_d2.data.samplers import seed_rng
from codetr_d2.engine import check_config, load_config
from codetr_d2.engine.optimizer import build_optimizer, clip_full_model
from codetr_d2.engine.trainer import autocast
from codetr_d2.errors import InputError
from codetr_d2.ops import active_backend, keep_freed_memory

from .against import (
    EAGER,
    HF,
    NO_AUXILIARY_HEADS,
    SEPARATE_PASSES,
    DeformableDETR,
    SeparatePasses,
    config_of,
    transformers_or_error,
)
from .machine import MemoryProbe, describe_machine, finisher
from .report import machine_line, measurement_rows, plot_measurements, print_table, save
from .runtimes import RUNTIMES, hf_in_openvino, in_runtime, runtime_of

__all__ = ["Case", "Runner", "benchmark_model", "build_cfg", "first_case", "parse_sweep", "random_batch", "read_config"]

OURS = "ours"
WARM_UP = {"cpu": 1, "cuda": 5}  # runs that are not measured
SWEEPS = ("size", "queries", "objects", "k", "head", "batch")
AUX_HEADS = ("atss", "roi", "paa", "retinanet", "fcos", "gfl")  # in the order of the paper


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        cfg: the model.
        training: a step of training, or inference.
        size: (height, width) of the images in pixels.
        batch: number of images.
        objects: in each image.
        dtype: float32, or bfloat16 where the config's mixed precision puts it.
        device: cpu or cuda.
        threads: on the CPU.
    """

    cfg: CfgNode
    training: bool
    size: tuple[int, int]
    batch: int
    objects: int
    dtype: str
    device: str
    threads: int


def read_config(args: argparse.Namespace, device: str) -> CfgNode:
    """The config of the command line, for random weights unless it names some, and in need of no dataset.

    Raises:
        InputError: an option is unknown.
    """
    if len(args.opts) % 2:
        raise InputError(f"options of the config are pairs of KEY VALUE; {args.opts[-1]} has no value")
    cfg = load_config(args.config_file, args.opts)
    cfg.MODEL.DEVICE = device
    if "MODEL.WEIGHTS" not in args.opts[::2]:
        cfg.MODEL.WEIGHTS = ""
    cfg.DATASETS.COCO_JSON, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [], ("coco_2017_train",), ()
    return cfg


def build_cfg(args: argparse.Namespace) -> CfgNode:
    """The config of the command line with what else it says of the model.

    Raises:
        InputError: an option is at fault.
    """
    cfg = read_config(args, args.device)
    if args.backend:
        cfg.MODEL.MS_DEFORM_ATTN = args.backend
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU")
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = args.dtype == "bfloat16", "bfloat16"
    check_config(cfg)
    return cfg


def first_case(args: argparse.Namespace, training: bool) -> Case:
    """What the command line describes, with the first of its sizes."""
    return Case(
        build_cfg(args), training, args.sizes[0], args.batch, args.objects, args.dtype, args.device, args.threads
    )


def random_batch(case: Case) -> list[dict]:
    """Random images, for training with random objects, as the dataset mapper would give them."""
    generator = torch.Generator().manual_seed(0)
    height, width = case.size
    scale = torch.tensor([width, height, width, height])
    batch = []
    for _ in range(case.batch):
        image = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)
        sample = {"image": image, "height": height, "width": width}
        batch.append(sample)
        if not case.training:
            continue
        sides = 0.05 + 0.35 * torch.rand(case.objects, 2, generator=generator)
        corners = torch.rand(case.objects, 2, generator=generator) * (1 - sides)
        boxes = torch.cat((corners, corners + sides), dim=1) * scale
        classes = torch.randint(case.cfg.MODEL.CODETR.NUM_CLASSES, (case.objects,), generator=generator)
        instances = Instances(case.size, gt_boxes=Boxes(boxes), gt_classes=classes)
        if case.cfg.MODEL.MASK_ON:
            masks = PolygonMasks([[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes.tolist()])
            if case.cfg.INPUT.MASK_FORMAT == "bitmask":
                bits = BitMasks(torch.zeros((0, height, width), dtype=torch.bool))
                masks = BitMasks.from_polygon_masks(masks, height, width) if case.objects else bits
            instances.gt_masks = masks
        sample["instances"] = instances
    return batch


def build_side(case: Case, against: list[str]) -> nn.Module:
    """The model of one side: ours, or the one that is compared with it."""
    torch.manual_seed(0)
    runtime = runtime_of(against)
    if HF in against:
        options = case.cfg.MODEL.CODETR
        model = DeformableDETR(options.NUM_QUERIES, options.NUM_CLASSES).to(case.device).eval()
        return model if runtime is None else hf_in_openvino(model, runtime, random_batch(case))
    model = build_model(case.cfg)
    if case.cfg.MODEL.WEIGHTS:
        CoDETRCheckpointer(model).load(case.cfg.MODEL.WEIGHTS)
    if SEPARATE_PASSES in against:
        model.query_head.decoder = SeparatePasses(model.query_head.decoder)
    if runtime is not None:
        return in_runtime(model.eval(), runtime, case.cfg, random_batch(case))
    return model.train(case.training)


class Runner:
    """Runs the model of one side on one random batch. For a process of its own, whose memory is measured."""

    def __init__(self, case: Case, against: list[str]):
        torch.set_num_threads(case.threads)
        self.context = nullcontext()
        if HF in against:
            transformers_or_error()  # not a part of the model's memory
            self.context = autocast(case.cfg)  # faster for this model than weights in bfloat16
        else:
            case = replace(case, cfg=config_of(case.cfg, against))
            case.cfg.MODEL.CODETR.INFERENCE_DTYPE = case.dtype
        self.case = case
        self.finish = finisher(case.device)
        self.batch = random_batch(case)
        self.memory = MemoryProbe(case.device)
        self.model = build_side(case, against)
        if case.device == "cpu":
            keep_freed_memory()  # from here on: exporting for a runtime takes much more than running
        self.backend = (
            None
            if HF in against or runtime_of(against)
            else active_backend(case.device, case.cfg.MODEL.MS_DEFORM_ATTN)[1]
        )
        if case.training:
            self.optimizer = build_optimizer(case.cfg, self.model)

    def run(self, turn: int) -> dict[str, float]:
        """One run, whose random numbers depend on ``turn`` alone: its ``seconds``, and the most memory so far."""
        seed_rng(turn)
        self.memory.restart()
        measured = self.train() if self.case.training else self.infer()
        return {**measured, "peak_bytes": self.memory.peak()}

    def infer(self) -> dict[str, float]:
        """Images in main memory -> detections."""
        self.finish()
        start = time.perf_counter()
        with torch.no_grad(), self.context:
            self.model(self.batch)
        self.finish()
        return {"seconds": time.perf_counter() - start}

    def train(self) -> dict[str, float]:
        """A step as the trainer does it, but for its log: losses, gradients, clipping, update."""
        cfg = self.case.cfg
        self.finish()
        start = time.perf_counter()
        with EventStorage(), autocast(cfg):
            losses = self.model(self.batch)
        loss = torch.stack([x.float() for x in losses.values()]).sum()
        self.finish()
        forward = time.perf_counter()
        self.backward(loss)
        self.finish()
        backward = time.perf_counter()
        clip_full_model(self.optimizer, cfg)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.finish()
        end = time.perf_counter()
        return {
            "seconds": end - start,
            "forward": forward - start,
            "backward": backward - forward,
            "loss": loss.item(),
        }

    def backward(self, loss: Tensor) -> None:
        """The gradients."""
        loss.backward()


def _serve(pipe: Connection, case: Case, against: list[str]) -> None:
    """The process of one side: answers each number of a turn with what it measured, or with the error."""
    try:
        runner = Runner(case, against)
        pipe.send(runner.backend)
        while True:
            pipe.send(runner.run(pipe.recv()))
    except (EOFError, ConnectionError):  # the benchmark has ended
        pass
    except InputError as error:
        pipe.send(error)
    except Exception:
        pipe.send(RuntimeError(traceback.format_exc()))


class _Side:
    """The benchmark's end of a side's process, which computes only while it is asked."""

    def __init__(self, name: str, case: Case, against: list[str]):
        context = get_context("spawn")
        self.name = name
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(other_end, case, against), daemon=True)
        self.process.start()
        other_end.close()
        self.backend = self._answer()

    def run(self, turn: int) -> dict[str, float]:
        self.pipe.send(turn)
        return self._answer()

    def stop(self) -> None:
        self.pipe.close()
        self.process.join()

    def _answer(self):
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise InputError(
                f"the process of {self.name!r} ended with status {self.process.exitcode}; -9 is what the system does "
                "where memory is short: take a smaller size or batch"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def measure(case: Case, against: list[list[str]], repeat: int) -> dict:
    """Measure our model, and in turn with it each side that it is compared with.

    Returns:
        ``sides``: by name the seconds of every run (of training also ``forward`` and ``backward``, and the loss), their
        ``median``, ``images_per_second``, ``peak_bytes`` (weights and all, at the worst moment of any measured run)
        and the ``backend`` of deformable attention.
    """
    sides: dict[str, _Side] = {}
    try:
        for parts in ([], *against):
            name = "+".join(parts) or OURS
            sides[name] = _Side(name, case, parts)
        runs: dict[str, list[dict]] = {name: [] for name in sides}
        for turn in range(-WARM_UP[case.device], repeat):
            for name, side in sides.items():
                measured = side.run(turn + WARM_UP[case.device])
                if turn >= 0:
                    runs[name].append(measured)
    finally:
        for side in sides.values():
            side.stop()
    result = {}
    for name, measured in runs.items():
        lists = {key: [run[key] for run in measured] for key in measured[0]}
        peaks = lists.pop("peak_bytes")
        median = statistics.median(lists["seconds"])
        result[name] = {
            **lists,
            "median": median,
            "images_per_second": case.batch / median,
            "peak_bytes": None if None in peaks else max(peaks),
            "backend": sides[name].backend,
        }
    return {"size": list(case.size), "batch": case.batch, "sides": result}


def parse_sweep(text: str) -> tuple[str, list[int] | list[str]]:
    """``size=256,512`` -> what is swept, and its values: numbers, or for ``head`` names.

    Raises:
        InputError: it is not of this form.
    """
    name, _, values = text.partition("=")
    if name == "head":
        if not set(values.split(",")) <= set(AUX_HEADS):
            raise InputError(f"--sweep {text}: it must list some of {', '.join(AUX_HEADS)}")
        return name, values.split(",")
    if name not in SWEEPS or not all(value.isdecimal() for value in values.split(",")):
        raise InputError(f"--sweep {text}: it must be like size=256,512,800; one of: {', '.join(SWEEPS)}")
    numbers = [int(value) for value in values.split(",")]
    if name not in ("objects", "k") and min(numbers) < 1:
        raise InputError(f"--sweep {text}: values of {name} must be at least 1")
    return name, numbers


def swept_case(case: Case, name: str, value: int | str) -> Case:
    """The case with one value of a sweep.

    Raises:
        InputError: the config has no such thing to sweep.
    """
    cfg = case.cfg.clone()
    if name in ("k", "head", "objects") and not case.training:
        raise InputError(f"--sweep {name}: only training depends on it; take the command train")
    if name == "size":
        return replace(case, size=(value, value))
    if name == "queries":
        cfg.MODEL.CODETR.NUM_QUERIES = value
    elif name in ("k", "head"):
        if not cfg.MODEL.CODETR.AUX_HEADS:
            raise InputError(
                f"--sweep {name}: the config has no auxiliary heads (MODEL.CODETR.AUX_HEADS is empty); name one that "
                "describes them all"
            )
        heads = [value] if name == "head" else [AUX_HEADS[i % len(AUX_HEADS)] for i in range(value)]
        cfg.MODEL.CODETR.AUX_HEADS = heads
        check_config(cfg)
    else:
        return replace(case, **{name: value})
    return replace(case, cfg=cfg)


def check_against(text: str, training: bool) -> list[list[str]]:
    """The sides of ``--against``, each as its parts; none for ``nothing``.

    Raises:
        InputError: a part is unknown, or does not fit the others or the command.
    """
    return [] if text == "nothing" else [_check_side(side, training) for side in text.split(",")]


def _check_side(text: str, training: bool) -> list[str]:
    parts = text.split("+")
    known = [EAGER, SEPARATE_PASSES, NO_AUXILIARY_HEADS, HF, *RUNTIMES]
    for part in parts:
        if part not in known:
            raise InputError(f"--against {part}: it may be nothing, or one or several joined by +: {', '.join(known)}")
    if HF in parts:
        if training or not set(parts) <= {HF, *RUNTIMES}:
            raise InputError(
                f"--against {HF}: another model, for the command inference and joined with nothing else but a runtime "
                f"({', '.join(RUNTIMES)})"
            )
        transformers_or_error()
    if runtime_of(parts) is not None and (training or len(set(parts) - {HF}) > 1):
        raise InputError(f"--against {text}: a runtime is for the command inference, by itself or joined with {HF}")
    if SEPARATE_PASSES in parts and not training:
        raise InputError(f"--against {SEPARATE_PASSES}: inference has one group of queries; take the command train")
    if NO_AUXILIARY_HEADS in parts and not training:
        raise InputError(f"--against {NO_AUXILIARY_HEADS}: inference has none; take the command train")
    return parts


def benchmark_model(args: argparse.Namespace, training: bool) -> None:
    """The commands ``inference`` and ``train``."""
    against = check_against(args.against, training)
    case = first_case(args, training)
    if args.sweep:
        name, values = parse_sweep(args.sweep)
        if name != "size" and len(args.sizes) > 1:
            raise InputError(f"--sizes: a sweep over {name} is made at one size")
        cases = {value: swept_case(case, name, value) for value in values}
    else:
        name = "size"
        cases = {f"{h}x{w}": replace(case, size=(h, w)) for h, w in args.sizes}
    command = "train" if training else "inference"
    report = {
        "command": command,
        "config": Path(args.config_file).stem,
        "options": args.opts,
        "dtype": args.dtype,
        "against": args.against,
        "swept": name,
        "machine": describe_machine(args.device, args.threads),
        "results": [],
    }
    title = f"{report['config']}, {command}, {args.dtype}, batch {args.batch}"
    if training:
        report["objects"] = args.objects
        title += f", {args.objects} objects"
    print(f"{title}; {machine_line(report['machine'])}\n", flush=True)
    for value, swept in cases.items():
        report["results"].append({"value": value, **measure(swept, against, args.repeat)})
        if args.output:  # after each, as a long run may be cut short
            save(report, plot_measurements(name, title, report["results"]), args.output)
    print_table(measurement_rows(name, report["results"]))
