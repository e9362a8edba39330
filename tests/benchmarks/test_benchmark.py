"""The benchmark's commands, on a model that is as small as it can be."""

import importlib
import itertools
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, PolygonMasks
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from codetr_d2.data.samplers import seed_rng
from codetr_d2.errors import InputError
from codetr_d2.modeling.transformer import DeformableDecoder
from codetr_d2.ops import active_backend, ms_deform_attn_eager, set_backend

CONFIGS = Path(__file__).parents[2] / "configs"
DINO = str(CONFIGS / "quick_start" / "co_dino_efficientnet_lite0_digits.yaml")
TINY = ["MODEL.CODETR.EMBED_DIM", "32", "MODEL.CODETR.NUM_QUERIES", "10", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"]
for part in ("ENCODER", "DECODER"):
    TINY += [f"MODEL.CODETR.{part}.{key}" for key in ("NUM_LAYERS", "FFN_DIM", "NUM_HEADS")]
TINY = TINY[:6] + list(itertools.chain(*zip(TINY[6:], ["2", "32", "4"] * 2)))
SMALL_CANVAS = ["INPUT.MAX_SIZE_TRAIN", 32, "INPUT.MAX_SIZE_TEST", 32, "MODEL.CODETR.CANVAS_SIZE", 32]
MODEL = ["--config-file", DINO, "--sizes", "64x64", "--repeat", "2"]


@pytest.fixture(autouse=True)
def restore():
    yield
    mock.patch.stopall()
    set_backend("auto")


@pytest.fixture
def script():
    return importlib.import_module("benchmarks.__main__")


@pytest.fixture
def in_process(monkeypatch):
    """Sides in this process: what they do is the same, but starting one takes no seconds."""
    model = importlib.import_module("benchmarks.model")

    class Side:
        def __init__(self, name, case, against):
            self.runner = model.Runner(case, against)
            self.run, self.backend = self.runner.run, self.runner.backend

        def stop(self):
            pass

    monkeypatch.setattr(model, "_Side", Side)


def run(script, *args) -> str:
    """What the command says of its end: "" where all is well, or the error."""
    try:
        script.main([str(x) for x in args])
    except SystemExit as error:
        return str(error.code)
    return ""


def make_case(opts=(), dtype="float32", config_file=DINO, **changes):
    model = importlib.import_module("benchmarks.model")
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


@pytest.mark.slow
def test_two_sides_of_a_training_step(script, tmp_path, capsys):
    output = tmp_path / "train.json"
    against = "eager+separate-passes"
    assert run(script, "train", *MODEL, "--objects", 3, "--against", against, "--output", output, *TINY) == ""
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


@pytest.mark.slow
def test_an_error_of_a_side_is_the_commands(script):
    error = run(script, "inference", *MODEL, *TINY, *SMALL_CANVAS)
    assert error.startswith("error: ") and "larger than MODEL.CODETR.CANVAS_SIZE" in error


def test_separate_passes_give_the_same_losses():
    model, against = importlib.import_module("benchmarks.model"), importlib.import_module("benchmarks.against")
    case = make_case(["MODEL.CODETR.AUX_HEADS", "['roi', 'atss']"], batch=2)
    detector, batch = model.build_side(case, []), model.random_batch(case)

    def losses():
        seed_rng(0)
        with EventStorage():
            values = detector(batch)
        return {name: value.item() for name, value in values.items()}

    together = losses()
    calls = []
    forward = DeformableDecoder.forward

    def recorded(decoder, groups, *args):
        calls.append([group.name for group in groups])
        return forward(decoder, groups, *args)

    mock.patch.object(DeformableDecoder, "forward", recorded).start()
    losses()
    assert calls == [["", "_dn", "_aux_roi", "_aux_atss"]]
    against.TAKE_BACK["separate-passes"](case.cfg)
    calls.clear()
    assert losses() == pytest.approx(together, rel=1e-4)
    assert calls == [["", "_dn"], ["_aux_roi"], ["_aux_atss"]]


def test_no_auxiliary_heads():
    model, against = importlib.import_module("benchmarks.model"), importlib.import_module("benchmarks.against")
    case = make_case(["MODEL.CODETR.AUX_HEADS", "['roi', 'atss']"])
    assert list(model.build_side(case, []).auxiliary_heads) == ["roi", "atss"]
    against.take_back(["no-auxiliary-heads"], case.cfg)
    assert not model.build_side(case, []).auxiliary_heads


def test_without_an_optimisation_the_losses_are_the_same():
    """Of a Co-DINO with ResNet-50, by each name alone and by all of them together with the eager operator."""
    model, against = importlib.import_module("benchmarks.model"), importlib.import_module("benchmarks.against")
    resnet = str(CONFIGS / "co_dino" / "co_dino_5scale_r50_1x_coco.yaml")
    small = [x for x in TINY if "NUM_HEADS" not in x and x != "4"] + ["MODEL.CODETR.DENOISING.NUM_QUERIES", "10"]
    options = ["MODEL.CODETR.NUM_FEATURE_LEVELS", "5", "MODEL.RESNETS.STEM_OUT_CHANNELS", "64", *small]

    def losses(names):
        case = make_case(options, config_file=resnet)
        enabled = torch.backends.cuda.flash_sdp_enabled()
        against.take_back(names, case.cfg)
        detector, batch = model.build_side(case, []), model.random_batch(case)
        seed_rng(0)
        with EventStorage():
            values = detector(batch)
        loss = sum(values.values())
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in detector.parameters() if p.grad is not None]).norm()
        mock.patch.stopall()
        for kind in ("flash", "mem_efficient", "cudnn"):
            getattr(torch.backends.cuda, f"enable_{kind}_sdp")(enabled)
        return {**{name: value.item() for name, value in values.items()}, "the gradient's norm": norm.item()}

    expected = losses([])
    for name in [*against.OPTIMISATIONS, "eager"]:
        assert losses([name]) == pytest.approx(expected, rel=1e-3), name


def test_eager_takes_all_back():
    against, cfg = importlib.import_module("benchmarks.against"), CfgNode({"MODEL": {"MS_DEFORM_ATTN": "auto"}})
    optimisations = {name: mock.Mock() for name in against.OPTIMISATIONS}
    with mock.patch.dict(against.OPTIMISATIONS, optimisations):
        against.take_back(["eager"], cfg)
    assert all(function.call_count == 1 for function in optimisations.values())
    assert cfg.MODEL.MS_DEFORM_ATTN == "eager"


def test_optimisations_are_taken_back(monkeypatch):
    against = importlib.import_module("benchmarks.against")
    weight = nn.Parameter(torch.ones(2))
    against.TAKE_BACK["without-fused-optimizer"](None)
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    assert optimizer.defaults["foreach"] is False and not optimizer.defaults["fused"]

    query = torch.randn(1, 2, 8, 16)
    kinds = ("flash", "mem_efficient", "cudnn")
    enabled = {kind: getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in kinds}
    try:
        against.TAKE_BACK["without-fused-attention"](None)
        with torch.profiler.profile() as profile:
            torch.nn.functional.scaled_dot_product_attention(query, query, query)
    finally:
        for kind, value in enabled.items():
            getattr(torch.backends.cuda, f"enable_{kind}_sdp")(value)
    names = {event.key for event in profile.key_averages()}
    assert any("softmax" in name for name in names) and not any("flash" in name for name in names)


def test_a_sweep(script, in_process, tmp_path, capsys):
    output = tmp_path / "queries.json"
    assert run(script, "inference", *MODEL, "--sweep", "queries=5,12", "--output", output, *TINY) == ""
    report = json.loads(output.read_text())
    assert report["swept"] == "queries" and [x["value"] for x in report["results"]] == [5, 12]
    assert all(len(x["sides"]["ours"]["seconds"]) == 2 for x in report["results"])
    assert output.with_suffix(".png").exists()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["5", "12"]


def test_what_is_swept():
    model = importlib.import_module("benchmarks.model")
    case = make_case()
    assert model.parse_sweep("k=0,3") == ("k", [0, 3])
    assert model.swept_case(case, "k", 3).cfg.MODEL.CODETR.AUX_HEADS == ["roi", "atss", "roi"]
    assert model.swept_case(case, "k", 0).cfg.MODEL.CODETR.AUX_HEADS == []
    assert model.swept_case(case, "queries", 7).cfg.MODEL.CODETR.NUM_QUERIES == 7
    assert case.cfg.MODEL.CODETR.NUM_QUERIES == 10
    assert model.swept_case(case, "size", 96).size == (96, 96)
    assert len(model.random_batch(model.swept_case(case, "batch", 4))) == 4
    assert len(model.random_batch(model.swept_case(case, "objects", 0))[0]["instances"]) == 0


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_random_objects(mask_format):
    model = importlib.import_module("benchmarks.model")
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
        ("inference", ["--against", "hf+eager"], "joined with nothing else"),
        ("inference", ["--against", "separate-passes"], "one group of queries"),
        ("inference", ["--against", "no-auxiliary-heads"], "inference has none"),
        ("inference", ["--sweep", "k=0,1"], "only training"),
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
def test_bad_input_gives_one_error(script, command, args, message):
    error = run(script, command, "--config-file", DINO, *args)
    assert error.startswith("error: ") and message in error and "\n" not in error


@pytest.mark.parametrize("sizes", ["800", "800x", "0x64", "800x1333;64x64"])
def test_sizes_are_pairs(script, sizes, capsys):
    assert run(script, "inference", "--config-file", DINO, "--sizes", sizes) == "2"
    assert "like 800x1333" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "module", "package"),
    [
        (["inference", "--config-file", DINO, "--against", "hf"], "transformers", "transformers"),
        (["op", "--against", "torch-ms-deform-attn"], "torch_ms_deform_attn", "torch-ms-deform-attn"),
    ],
)
def test_packages_that_are_missing(script, monkeypatch, args, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("benchmark_op.active_backend", lambda device: ("cpp", ""))
    error = run(script, *args)
    assert error.startswith("error: ") and "pip install" in error and package in error


def test_the_packages_operator_in_the_model(monkeypatch, in_process):
    model = importlib.import_module("benchmarks.model")
    calls = []

    def operator(value, *args):
        calls.append({x.dtype for x in (value, *args) if x.is_floating_point()})
        return ms_deform_attn_eager(value, *args)

    monkeypatch.setitem(sys.modules, "torch_ms_deform_attn", SimpleNamespace(ms_deform_attn=operator))
    runner = model.Runner(make_case(training=False, dtype="bfloat16"), ["torch-ms-deform-attn"])
    runner.run(0)
    assert calls == [{torch.bfloat16}] * 4  # two layers each of encoder and decoder


def test_op(script, monkeypatch, tmp_path):
    op = importlib.import_module("benchmarks.op")
    monkeypatch.setitem(op.SIZES, "encoder-4", (64, 128))
    monkeypatch.setattr(op, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(op, "return_freed_memory", lambda: None)
    output = tmp_path / "op.json"
    fastest, _ = active_backend("cpu")
    error = run(script, "op", "--repeat", 2, "--output", output)
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
    op = importlib.import_module("benchmarks.op")
    monkeypatch.setitem(sys.modules, "torch_ms_deform_attn", SimpleNamespace(ms_deform_attn=ms_deform_attn_eager))
    inputs = op.make_inputs((64,), torch.bfloat16)
    assert inputs[3].dtype == torch.float32
    theirs = op.inputs_of("torch-ms-deform-attn", inputs)
    assert theirs[3].dtype == theirs[4].dtype == torch.bfloat16 and theirs[1].dtype == torch.int64
    inputs = op.make_inputs((64,), torch.float32)
    results = [op.run_once(op.operator_of(side), inputs, True) for side in ("torch-ms-deform-attn", "eager")]
    assert len(results[0]) == 4
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("config", "opts"), [(DINO, []), ("co_dino/co_dino_5scale_lsj_r50_1x_coco.yaml", [])])
def test_loader(script, config, opts, tmp_path, capsys):
    output = tmp_path / "loader.json"
    canvas = ["MODEL.CODETR.CANVAS_SIZE", 64, "INPUT.MAX_SIZE_TEST", 64] if "lsj" in config else []
    args = ["--images", 4, "--files", 2, "--objects", 3, "--output", output]
    options = ["DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 2, *canvas]
    assert run(script, "loader", "--config-file", CONFIGS / config, *args, *options) == ""
    report = json.loads(output.read_text())
    mapper, loader = report["mapper"], report["loader"]
    assert len(mapper["parts"]) == 3 and all(seconds > 0 for seconds in mapper["parts"].values())
    assert sum(mapper["parts"].values()) == pytest.approx(mapper["seconds"])
    assert mapper["images_per_second"] == pytest.approx(4 / mapper["seconds"])
    assert loader["workers"] == 0 and loader["images_per_second"] == pytest.approx(4 / loader["seconds"])
    assert output.with_suffix(".png").exists()
    assert "the mapper alone" in capsys.readouterr().out


def test_the_loaders_pictures(tmp_path):
    records = importlib.import_module("benchmarks.loader").make_dataset(tmp_path, 2, 5, 7)
    assert [Image.open(x["file_name"]).size for x in records] == [(640, 480)] * 2
    for annotation in records[0]["annotations"]:
        corners = np.reshape(annotation["segmentation"][0], (-1, 2))
        assert (corners >= 0).all() and (corners <= (640, 480)).all()
        np.testing.assert_allclose(annotation["bbox"], [*corners.min(0), *corners.max(0)])
        assert 0 <= annotation["category_id"] < 7


@pytest.mark.parametrize("train", [[], ["--train", "--objects", 3]], ids=["inference", "train"])
def test_parts(script, monkeypatch, tmp_path, train):
    parts = importlib.import_module("benchmarks.parts")
    monkeypatch.setattr(parts, "MATRIX_PRODUCTS", ((64, 64, 64),))
    monkeypatch.setattr(parts, "COPIED_BYTES", 2**16)
    output = tmp_path / "parts.json"
    assert run(script, "parts", *MODEL, *train, "--output", output, *TINY) == ""
    report = json.loads(output.read_text())
    assert all(report["peaks"][name] > 0 for name in ("float32", "bfloat16", "copy"))
    measured = report["parts"]
    names = {"backbone", "neck", "encoder: feed-forward", "decoder: self-attention", "proposals", "the rest"}
    names |= {f"{owner}: {part}" for owner in ("encoder", "decoder") for part in ("deformable attention",)}
    names |= {"backward", "the optimizer's step", "auxiliary head roi"} if train else set()
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
    parts = importlib.import_module("benchmarks.parts")
    scopes = parts.Scopes(lambda: None)
    x, weight = torch.randn(10, 4), torch.randn(6, 4)

    def work(x):
        y = x @ weight.t()  # a view, and a product
        return y[None].expand(3, -1, -1) + 1

    with parts.Counter(scopes) as counter:
        scopes.inside("part", work)(x)
        x.view(40).add_(1)
        x.new_empty(1000)
    assert dict(counter.flops) == {"part": 2 * 10 * 6 * 4}
    product, added = 10 * 4 + 6 * 4 + 10 * 6, 10 * 6 + 3 * 10 * 6
    assert dict(counter.bytes) == {"part": 4 * (product + added), parts.REST: 4 * (40 + 40)}


def test_flops_of_attention():
    parts = importlib.import_module("benchmarks.parts")

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
    parts = importlib.import_module("benchmarks.parts")
    clock = itertools.count()
    monkeypatch.setattr(parts.time, "perf_counter", lambda: next(clock))
    scopes = parts.Scopes(lambda: None)  # 0
    inner = scopes.inside(lambda: f"{scopes.stack[-1]}, inner", lambda: None)

    def fails():
        inner()
        raise InputError("no")

    with pytest.raises(InputError):
        scopes.inside("outer", fails)()  # enters at 1, inner from 2 to 3, leaves at 4
    scopes.charge()  # 5
    assert dict(scopes.seconds) == {parts.REST: 2, "outer": 2, "outer, inner": 1}


def test_the_loop_times_all_of_an_iteration(script, tmp_path, capsys, monkeypatch):
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
    assert run(script, "loop", "--config-file", DINO, "--iterations", 3, "--output", output, *TINY, *opts) == ""
    seconds = time.perf_counter() - start
    report = json.loads(output.read_text())
    assert len(report["iterations"]) == 3
    parts = {"forward", "matching", "backward", "clipping", "optimizer", "EMA", "hooks and log", "data", "rest"}
    for iteration in report["iterations"]:
        assert set(iteration) == parts and min(iteration.values()) > 0
    whole = sum(sum(x.values()) for x in report["iterations"])
    inside = sum(x["forward"] + x["backward"] for x in report["iterations"])
    assert whole < seconds and report["outside_share"] == pytest.approx(1 - inside / whole)
    assert "all but forward and backward" in capsys.readouterr().out
    assert torch.Tensor.backward.__module__ == "torch._tensor"  # as it was


def test_the_tables_of_the_page_are_those_of_the_files():
    tables = importlib.import_module("benchmarks.tables")
    pages = [page.read_text() for page in tables.PAGES]
    for mark in ("<!-- table ", "<!-- end -->"):
        assert sum(page.count(mark) for page in pages) == len(tables.TABLES)
    assert [tables.with_tables(page) for page in pages] == pages, "run python -m benchmarks.tables"
