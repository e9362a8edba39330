"""The benchmark's commands, on a model that is as small as it can be."""

import contextlib
import io
import itertools
import json
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, PolygonMasks
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as script
from benchmarks import against, annotations, loader, machine, model, op, parts, tables
from codetr_d2.data.annotations import read_coco_json
from codetr_d2.data.samplers import seed_rng
from codetr_d2.errors import InputError
from codetr_d2.evaluation import average_precisions
from codetr_d2.ops import active_backend, ms_deform_attn

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"
DINO = str(CONFIGS / "quick_start" / "co_dino_efficientnet_lite0_digits.yaml")
TINY = ["MODEL.CODETR.EMBED_DIM", "32", "MODEL.CODETR.NUM_QUERIES", "10", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"]
for part in ("ENCODER", "DECODER"):
    TINY += [f"MODEL.CODETR.{part}.{key}" for key in ("NUM_LAYERS", "FFN_DIM", "NUM_HEADS")]
TINY = TINY[:6] + list(itertools.chain(*zip(TINY[6:], ["2", "32", "4"] * 2)))
SMALL_CANVAS = ["INPUT.MAX_SIZE_TRAIN", 32, "INPUT.MAX_SIZE_TEST", 32, "MODEL.CODETR.CANVAS_SIZE", 32]
MODEL = ["--config-file", DINO, "--sizes", "64x64", "--repeat", "2"]


@pytest.fixture
def in_process(monkeypatch):
    """Sides in this process: what they do is the same, but starting one takes no seconds."""

    class Side:
        def __init__(self, name, case, against):
            self.runner = model.Runner(case, against)
            self.run, self.backend = self.runner.run, self.runner.backend

        def stop(self):
            pass

    monkeypatch.setattr(model, "_Side", Side)


def run(*args) -> str:
    """What the command says of its end: "" where all is well, or the error, with which its exit code is 2."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            script.main([str(x) for x in args])
    except SystemExit as error:
        assert error.code == 2
        return errors.getvalue().strip()
    return ""


def make_case(opts=(), dtype="float32", config_file=DINO, **changes):
    args = SimpleNamespace(
        config_file=config_file,
        opts=[*TINY, *opts],
        sizes=[(64, 96)],
        batch=1,
        objects=3,
        dtype=dtype,
        device="cpu",
        threads=torch.get_num_threads(),
        backend=None,
    )
    return replace(model.first_case(args, training=True), **changes)


def test_two_sides_of_a_training_step(tmp_path, capsys):
    output = tmp_path / "train.json"
    against = "eager+separate-passes"
    assert run("train", *MODEL, "--objects", 3, "--against", against, "--output", output, *TINY) == ""
    report = json.loads(output.read_text())
    assert report["command"] == "train" and report["against"] == against and report["objects"] == 3
    assert report["config"] == "co_dino_efficientnet_lite0_digits"
    assert report["machine"]["cores"] >= 1 and "load_before" in report["machine"]
    (result,) = report["results"]
    ours, theirs = result["sides"]["ours"], result["sides"][against]
    for side in (ours, theirs):
        assert len(side["seconds"]) == len(side["forward"]) == 2
        assert all(f + b < s for f, b, s in zip(side["forward"], side["backward"], side["seconds"]))
        assert side["images_per_second"] == pytest.approx(1 / side["median"])
        assert side["peak_bytes"] is None or 2**20 < side["peak_bytes"] < 2**31
    assert theirs["backend"] == "asked for"
    # Both start from the same weights and draw the same random numbers; the second run comes after a step or two.
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert len(set(ours["loss"])) == 2
    assert Image.open(tmp_path / "train.png").size[0] > 500
    assert f"| {against} |" in capsys.readouterr().out


@pytest.mark.usefixtures("in_process")
def test_several_sides(tmp_path):
    output = tmp_path / "train.json"
    assert run("train", *MODEL, "--against", "eager,eager+separate-passes", "--output", output, *TINY) == ""
    (result,) = json.loads(output.read_text())["results"]
    assert list(result["sides"]) == ["ours", "eager", "eager+separate-passes"]
    losses = [side["loss"][0] for side in result["sides"].values()]
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-3)


def test_an_error_of_a_side_is_the_commands():
    error = run("inference", *MODEL, *TINY, *SMALL_CANVAS)
    assert error.startswith("error: ") and "larger than MODEL.CODETR.CANVAS_SIZE" in error


def test_separate_passes_give_the_same_losses():
    case = make_case(["MODEL.CODETR.AUX_HEADS", "['roi', 'atss']"], batch=2)
    batch = model.random_batch(case)

    def losses_and_passes(detector, decoder):
        passes = []
        decoder.register_forward_pre_hook(lambda _, args: passes.append([group.name for group in args[0]]))
        seed_rng(0)
        with EventStorage():
            values = detector(batch)
        return {name: value.item() for name, value in values.items()}, passes

    together, separate = (model.build_side(case, names) for names in ([], ["separate-passes"]))
    expected, passes = losses_and_passes(together, together.query_head.decoder)
    assert passes == [["", "_dn", "_aux_roi", "_aux_atss"]]
    losses, passes = losses_and_passes(separate, separate.query_head.decoder.decoder)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert passes == [["", "_dn"], ["_aux_roi"], ["_aux_atss"]]


@pytest.mark.parametrize(
    ("name", "section", "option", "value"),
    [("eager", "MODEL", "MS_DEFORM_ATTN", "eager"), ("no-auxiliary-heads", "MODEL.CODETR", "AUX_HEADS", [])],
)
def test_a_side_differs_in_one_option(name, section, option, value):
    cfg = make_case().cfg
    before, changed = cfg.clone(), against.config_of(cfg, [name])
    assert cfg == before and changed != before
    for key in section.split("."):
        before = before[key]
    options = changed["MODEL"] if section == "MODEL" else changed["MODEL"]["CODETR"]
    assert options[option] == value
    options[option] = before[option]
    assert changed == cfg


def test_a_sweep(in_process, tmp_path, capsys):
    output = tmp_path / "queries.json"
    assert run("inference", *MODEL, "--sweep", "queries=5,12", "--output", output, *TINY) == ""
    report = json.loads(output.read_text())
    assert report["swept"] == "queries" and [x["value"] for x in report["results"]] == [5, 12]
    assert all(len(x["sides"]["ours"]["seconds"]) == 2 for x in report["results"])
    assert output.with_suffix(".png").exists()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["5", "12"]


def test_what_is_swept():
    case = make_case()
    assert model.parse_sweep("k=0,3") == ("k", [0, 3])
    assert model.swept_case(case, "k", 3).cfg.MODEL.CODETR.AUX_HEADS == ["atss", "roi", "paa"]
    assert model.parse_sweep("head=gfl,roi") == ("head", ["gfl", "roi"])
    assert model.swept_case(case, "head", "gfl").cfg.MODEL.CODETR.AUX_HEADS == ["gfl"]
    assert model.swept_case(case, "k", 0).cfg.MODEL.CODETR.AUX_HEADS == []
    assert model.swept_case(case, "queries", 7).cfg.MODEL.CODETR.NUM_QUERIES == 7
    assert case.cfg.MODEL.CODETR.NUM_QUERIES == 10
    assert model.swept_case(case, "size", 96).size == (96, 96)
    assert len(model.random_batch(model.swept_case(case, "batch", 4))) == 4
    assert len(model.random_batch(model.swept_case(case, "objects", 0))[0]["instances"]) == 0


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_random_objects(mask_format):
    case = make_case(batch=2, objects=5)
    case.cfg.MODEL.MASK_ON, case.cfg.INPUT.MASK_FORMAT = True, mask_format
    first, second = model.random_batch(case)
    assert first["image"].shape == (3, 64, 96) and not torch.equal(first["image"], second["image"])
    objects = first["instances"]
    boxes = objects.gt_boxes.tensor
    assert (boxes[:, 2:] - boxes[:, :2] > 2).all() and (boxes >= 0).all()
    assert (boxes[:, 2] <= 96).all() and (boxes[:, 3] <= 64).all()
    assert isinstance(objects.gt_masks, PolygonMasks if mask_format == "polygon" else BitMasks)
    difference = objects.gt_masks.get_bounding_boxes().tensor - boxes
    assert len(difference) == 5 and difference.abs().max() <= 1
    assert len(model.random_batch(replace(case, objects=0))[0]["instances"].gt_masks) == 0


@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        ("inference", ["--against", "fast"], "--against fast"),
        ("inference", ["--against", "torch-ms-deform-attn"], "it may be nothing, or"),
        ("inference", ["--against", "hf+eager"], "joined with nothing else"),
        ("inference", ["--against", "separate-passes"], "one group of queries"),
        ("inference", ["--against", "no-auxiliary-heads"], "inference has none"),
        ("inference", ["--sweep", "k=0,1"], "only training"),
        ("inference", ["--sweep", "head=roi"], "only training"),
        ("train", ["--sweep", "head=mask"], "some of atss, roi"),
        ("inference", ["--sweep", "colour=1"], "size, queries"),
        ("inference", ["--sweep", "size=a"], "size, queries"),
        ("inference", ["--sweep", "batch=0"], "at least 1"),
        ("inference", ["--sweep", "batch=1", "--sizes", "64x64,32x32"], "at one size"),
        ("inference", ["MODEL.DEVICE"], "KEY VALUE"),
        ("inference", ["MODEL.CODETR.QUERIES", "3"], "unknown option"),
        ("inference", ["MODEL.CODETR.EMBED_DIM", "33"], "NUM_HEADS"),
        ("train", ["--against", "hf"], "for the command inference"),
        ("train", ["--sweep", "k=0,1", "MODEL.CODETR.AUX_HEADS", "[]"], "no auxiliary heads"),
        ("parts", ["--sizes", "64x64,32x32"], "at one size"),
    ],
)
def test_bad_input_gives_one_error(command, args, message):
    error = run(command, "--config-file", DINO, *args)
    assert error.startswith("error: ") and message in error and "\n" not in error


@pytest.mark.parametrize("sizes", ["800", "800x", "0x64", "800x1333;64x64"])
def test_sizes_are_pairs(sizes):
    assert "like 800x1333" in run("inference", "--config-file", DINO, "--sizes", sizes)


@pytest.mark.parametrize(
    ("args", "module", "package"),
    [
        (["inference", "--config-file", DINO, "--against", "hf"], "transformers", "transformers"),
        (["op", "--against", "torch-ms-deform-attn"], "torch_ms_deform_attn", "torch-ms-deform-attn"),
    ],
)
def test_packages_that_are_missing(monkeypatch, args, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("benchmarks.op.active_backend", lambda device: ("cpp", ""))
    error = run(*args)
    assert error.startswith("error: ") and "pip install" in error and package in error


def test_op(monkeypatch, tmp_path):
    monkeypatch.setitem(op.SIZES, "encoder-4", (64, 128))
    monkeypatch.setattr(op, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(op, "return_freed_memory", lambda: None)
    output = tmp_path / "op.json"
    fastest, _ = active_backend("cpu")
    error = run("op", "--repeat", 2, "--output", output)
    if fastest == "eager":
        assert "nothing to compare eager with" in error
        return
    assert error == ""
    (result,) = json.loads(output.read_text())["results"]
    assert result["tokens"] == 13 * 21 + 7 * 11
    for name in ("forward", "forward + backward"):
        measured = result["passes"][name]
        assert [len(measured["seconds"][side]) for side in ("cpp", "eager")] == [2, 2]
        assert measured["extra_bytes"].keys() == {"cpp", "eager"} and measured["ratio"] > 0
    assert output.with_suffix(".png").exists()


def test_op_on_the_packages_terms(monkeypatch):
    def operator(value, spatial_shapes, level_start_index, locations, weights):
        assert spatial_shapes.dtype == level_start_index.dtype == torch.int64
        assert level_start_index.tolist() == [0, 13 * 21] and value.dtype == locations.dtype == weights.dtype
        return ms_deform_attn(value, list(map(tuple, spatial_shapes.tolist())), locations, weights, backend="eager")

    monkeypatch.setitem(sys.modules, "torch_ms_deform_attn", SimpleNamespace(ms_deform_attn=operator))
    inputs = op.make_inputs((64, 128), torch.bfloat16)
    assert inputs[0].dtype == torch.bfloat16 and inputs[2].dtype == inputs[3].dtype == torch.float32
    op.run_once(op.operator_of("torch-ms-deform-attn"), op.inputs_of("torch-ms-deform-attn", inputs), False)
    inputs = op.make_inputs((64, 128), torch.float32)
    sides = ("torch-ms-deform-attn", "eager")
    results = [op.run_once(op.operator_of(side), op.inputs_of(side, inputs), True) for side in sides]
    assert len(results[0]) == 4
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("config", [DINO, "co_dino/co_dino_5scale_lsj_r50_1x_coco.yaml"])
def test_loader(config, tmp_path, capsys):
    output = tmp_path / "loader.json"
    canvas = ["MODEL.CODETR.CANVAS_SIZE", 64, "INPUT.MAX_SIZE_TEST", 64] if "lsj" in config else []
    args = ["--images", 4, "--files", 2, "--objects", 3, "--output", output]
    options = ["DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 2, *canvas]
    assert run("loader", "--config-file", CONFIGS / config, *args, *options) == ""
    report = json.loads(output.read_text())
    mapper, whole = report["mapper"], report["loader"]
    assert len(mapper["parts"]) == 2 and all(seconds > 0 for seconds in mapper["parts"].values())
    assert sum(mapper["parts"].values()) == pytest.approx(mapper["seconds"])
    assert mapper["images_per_second"] == pytest.approx(4 / mapper["seconds"])
    assert whole["workers"] == 0 and whole["images_per_second"] == pytest.approx(4 / whole["seconds"])
    assert output.with_suffix(".png").exists()
    assert "the mapper alone" in capsys.readouterr().out


@pytest.mark.parametrize("command, peer", [("annotations", "detectron2, not checked"), ("evaluation", "pycocotools")])
def test_annotations_in_turn_with_a_peer(tmp_path, capsys, command, peer):
    output = tmp_path / "report.json"
    args = ("--images", 20, "--objects", 90, "--repeat", 2, "--threads", 1, "--output", output)
    assert run(command, *args, *(("--detections", 12) if command == "evaluation" else ())) == ""
    report = json.loads(output.read_text())
    assert len(report["sides"]) == 2 and all(len(x["seconds"]) == 2 for x in report["sides"].values())
    assert peer in capsys.readouterr().out and output.with_suffix(".png").exists()


def test_the_annotations_of_the_benchmark_are_fit_for_it(tmp_path):
    """Nothing of them is left out, and some detections are right."""
    data = annotations.make_annotations(20, 90)
    (tmp_path / "data.json").write_text(json.dumps(data))
    dataset = read_coco_json(str(tmp_path / "data.json"), str)
    assert sum(len(x["annotations"]) for x in dataset.records) == 90 and not dataset.maskless
    results = [{**x, "category_id": x["category_id"] - 1} for x in annotations.make_detections(data, 12)]
    assert 5 < average_precisions(dataset, results, "bbox", "coco")["AP50"] < 95


def test_the_loaders_pictures(tmp_path):
    records = loader.make_dataset(tmp_path, 2, 5, 7)
    assert [Image.open(x["file_name"]).size for x in records] == [(640, 480)] * 2
    for annotation in records[0]["annotations"]:
        corners = np.reshape(annotation["segmentation"][0], (-1, 2))
        assert (corners >= 0).all() and (corners <= (640, 480)).all()
        np.testing.assert_allclose(annotation["bbox"], [*corners.min(0), *corners.max(0)])
        assert 0 <= annotation["category_id"] < 7


@pytest.mark.parametrize("train", [[], ["--train", "--objects", 3]], ids=["inference", "train"])
def test_parts(monkeypatch, tmp_path, train):
    monkeypatch.setattr(parts, "MATRIX_PRODUCTS", ((64, 64, 64),))
    monkeypatch.setattr(parts, "COPIED_BYTES", 2**16)
    output = tmp_path / "parts.json"
    assert run("parts", *MODEL, *train, "--output", output, *TINY) == ""
    report = json.loads(output.read_text())
    assert all(report["peaks"][name] > 0 for name in ("float32", "bfloat16", "copy"))
    measured = report["parts"]
    names = {"backbone", "neck", "encoder: feed-forward", "decoder: self-attention", "proposals", "the rest"}
    names |= {"backward", "the optimizer's step", "auxiliary head roi"} if train else set()
    if active_backend("cpu")[0] == "cpp":
        names |= {"encoder: deformable attention", "decoder: deformable attention"}
    assert names <= set(measured)
    assert sum(part["seconds"] for part in measured.values()) == pytest.approx(report["seconds"])
    # 64 x 64 pixels are 8 * 8 + 4 * 4 + 2 * 2 tokens; two layers of two matrix products between 32 and 32 channels.
    assert measured["encoder: feed-forward"]["flops"] == 2 * 2 * 2 * 84 * 32 * 32
    if active_backend("cpu")[0] == "cpp":
        assert measured["encoder: deformable attention"]["flops"] == 2 * 2 * 4 * 84 * 32 * 3 * 4
    for part in measured.values():
        assert part["share_of_peak_flops"] == pytest.approx(
            part["flops"] / part["seconds"] / report["peaks"]["float32"]
        )
    assert output.with_suffix(".png").exists()


def test_counter():
    scopes = parts.Scopes(lambda: None)
    x, weight = torch.randn(10, 4), torch.randn(6, 4)

    def work(x):
        y = x @ weight.t()  # a view, and a product
        return y[None].expand(3, -1, -1) + 1

    with parts.Counter(scopes) as counter:
        with scopes.inside("part"):
            work(x)
        x.view(40).add_(1)
        x.new_empty(1000)
    assert dict(counter.flops) == {"part": 2 * 10 * 6 * 4}
    product, added = 10 * 4 + 6 * 4 + 10 * 6, 10 * 6 + 3 * 10 * 6
    assert dict(counter.bytes) == {"part": 4 * (product + added), parts.REST: 4 * (40 + 40)}


def test_flops_of_attention():

    def count(counter, get):
        q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
        with counter:
            torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
        return get()

    ours = parts.Counter(parts.Scopes(lambda: None))
    # Matrix products one by one, as the kernel is not in PyTorch's table; the backward kernel makes one of them again.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = FlopCounterMode(display=False)
        expected = count(plain, plain.get_total_flops)
    assert count(ours, lambda: sum(ours.flops.values())) == expected + 2 * 2 * 3 * 5 * 7 * 8


def test_scopes(monkeypatch):
    class Inner(nn.Module):
        def forward(self, fails):
            if fails:
                raise InputError("no")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self):
            self.inner(False)
            self.inner(True)

    clock = itertools.count()
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    scopes, outer = parts.Scopes(lambda: None), Outer()  # 0
    scopes.add("outer", outer)
    scopes.add("inner", outer.inner)
    with pytest.raises(InputError):
        outer()  # enters at 1, inner from 2 to 3 and from 4 to 5, leaves at 6
    scopes.lap(parts.REST)  # 7
    assert dict(scopes.seconds) == {parts.REST: 2, "outer": 3, "inner": 2}
    assert scopes.stack == [parts.REST]


def test_the_loop_times_all_of_an_iteration(tmp_path, capsys):
    image = tmp_path / "0.jpg"
    Image.new("RGB", (64, 64)).save(image)
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 24, 24], "area": 576, "iscrowd": 0}
    (tmp_path / "train.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "0.jpg", "height": 64, "width": 64}],
                "annotations": [annotation],
                "categories": [{"id": i, "name": str(i)} for i in range(1, 11)],
            }
        )
    )
    name = "benchmark_loop_train"
    data = [[name, str(tmp_path), str(tmp_path / "train.json")]]
    opts = ["DATASETS.COCO_JSON", data, "DATASETS.TRAIN", [name], "SOLVER.IMS_PER_BATCH", 1]
    opts += ["INPUT.MIN_SIZE_TRAIN", "[64]", "INPUT.MAX_SIZE_TRAIN", 64, "SOLVER.EMA.ENABLED", True]
    output = tmp_path / "loop.json"
    start = time.perf_counter()
    assert run("loop", "--config-file", DINO, "--iterations", 3, "--output", output, *TINY, *opts) == ""
    seconds = time.perf_counter() - start
    report = json.loads(output.read_text())
    assert len(report["iterations"]) == 3
    names = {"hooks", "data", "forward", "backward", "clipping and loss values", "optimizer", "EMA"}
    for iteration in report["iterations"]:
        assert set(iteration) == names and min(iteration.values()) > 0
    whole = sum(sum(x.values()) for x in report["iterations"])
    inside = sum(x["forward"] + x["backward"] for x in report["iterations"])
    assert whole < seconds and report["outside_share"] == pytest.approx(1 - inside / whole)
    assert "all but forward and backward" in capsys.readouterr().out


def test_the_tables_of_the_page_are_those_of_the_files():
    pages = [page.read_text() for page in tables.PAGES]
    for mark in ("<!-- table ", "<!-- end -->"):
        assert sum(page.count(mark) for page in pages) == len(tables.TABLES)
    assert [tables.with_tables(page) for page in pages] == pages, "run python -m benchmarks.tables"


def commands_of_the_page():
    """The benchmark's commands in docs/performance.md, as lists of arguments."""
    commands = []
    text = (tables.ROOT / "docs" / "performance.md").read_text().replace("\\\n", " ")
    config = ""
    for line in text.splitlines():
        if line.startswith("CONFIG="):
            config = line.removeprefix("CONFIG=")
        elif line.startswith("python -m benchmarks "):
            commands.append(shlex.split(line.replace("$CONFIG", config))[3:])
    return commands


@pytest.mark.parametrize("command", commands_of_the_page(), ids=" ".join)
def test_the_commands_of_the_page_are_valid(command, monkeypatch):
    monkeypatch.chdir(tables.ROOT)
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace())
    args = script.build_parser().parse_args(command)
    if command[0] in ("inference", "train"):
        training = command[0] == "train"
        model.check_against(args.against, training)
        case = model.first_case(args, training)
        if args.sweep:
            name, values = model.parse_sweep(args.sweep)
            assert [model.swept_case(case, name, value) for value in values]
    elif command[0] not in ("op", "annotations", "evaluation"):
        assert model.read_config(args, "cpu")
