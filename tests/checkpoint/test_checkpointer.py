import copy
import io
import math
import os
import pickle
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

from codetr_d2 import add_codetr_config
from codetr_d2.checkpoint.checkpointer import CoDETRCheckpointer, atomic_write, check_writable
from codetr_d2.checkpoint.convert import checkpoint_to_codetr
from codetr_d2.checkpoint.published import codetr_to_published
from codetr_d2.checkpoint.safe_load import load_numpy_pickle
from codetr_d2.engine.ema import ModelEMA
from codetr_d2.errors import InputError

ROOT = Path(__file__).parents[2]


class Model(nn.Module):
    OPTIONS_OF_SHAPES = {"class_embed": "MODEL.CODETR.NUM_CLASSES"}

    def __init__(self, num_classes=5):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.class_embed = nn.Linear(4, num_classes)
        self.reg_embed = nn.Linear(4, 4)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[key], b[key]) for key in a)


class Runs:
    """An object whose pickle runs code when it is read freely."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    atomic_write(str(path), lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the new")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        atomic_write(str(path), fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    atomic_write(str(path), lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_a_full_disk_leaves_the_old_file(tmp_path, limit_files):
    checkpointer = CoDETRCheckpointer(Model(), str(tmp_path))
    checkpointer.save("model_0000001")
    size = (tmp_path / "model_0000001.pth").stat().st_size + 1000
    checkpointer.model.added = nn.Linear(100, 1000)
    with (
        limit_files(size),
        pytest.raises(InputError, match="model_0000003.pth: cannot be written: File too large; mak"),
    ):
        checkpointer.save("model_0000003")
    with limit_files(size), pytest.raises(InputError, match="model_0000001.pth: cannot be written"):
        checkpointer.save("model_0000001")
    with limit_files(0), pytest.raises(InputError, match=f"{tmp_path}: nothing can be written .*: File too large"):
        check_writable(str(tmp_path))
    with limit_files(0), pytest.raises(InputError, match="last_checkpoint: cannot be written"):
        checkpointer.tag_last_checkpoint("model_0000003.pth")
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]
    fresh = Model()
    CoDETRCheckpointer(fresh, str(tmp_path)).resume_or_load("", resume=True)
    assert same(fresh.class_embed, checkpointer.model.class_embed)


@pytest.mark.slow
def test_what_killed_processes_left_is_removed(tmp_path):
    script = """
import os, sys, time
from codetr_d2.checkpoint.checkpointer import atomic_write
def write(file):
    file.write(b"half")
    file.flush()
    print("writes", flush=True)
    sys.stdin.read()
atomic_write(sys.argv[1], write)
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, tmp_path / name], **pipes) for name in ("killed", "slow")]
    for process in processes:
        assert process.stdout.readline() == "writes\n"
    assert len(os.listdir(tmp_path)) == 2
    processes[0].kill()
    processes[0].communicate()
    atomic_write(str(tmp_path / "other"), lambda file: file.write(b"whole"))
    assert len(os.listdir(tmp_path)) == 2 and (tmp_path / "other").read_bytes() == b"whole"
    processes[1].communicate("")
    assert processes[1].returncode == 0 and sorted(os.listdir(tmp_path)) == ["other", "slow"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_neither_written_nor_read(tmp_path, value):
    model = Model()
    checkpointer = CoDETRCheckpointer(model, str(tmp_path))
    with torch.no_grad():
        model.reg_embed.weight[1, 2] = value
    with pytest.raises(InputError, match=r"model_0000001\.pth: not written.*reg_embed\.weight\. No checkpoint was"):
        checkpointer.save("model_0000001")
    assert os.listdir(tmp_path) == []
    checkpointer.model = Model()
    checkpointer.save("model_0000001")
    checkpointer.model = model
    whole = re.escape(str(tmp_path / "model_0000001.pth"))
    with pytest.raises(InputError, match=rf"model_0000003\.pth: not written.*The last whole checkpoint is {whole}\."):
        checkpointer.save("model_0000003")
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]

    averages = {f"ema.{name}": x for name, x in model.state_dict().items()}
    for content, options in (
        ({"model": model.state_dict()}, ""),
        ({"model": model.state_dict()}, "?matching_heuristics=True"),
        ({"model": Model().state_dict(), "ema": model.state_dict()}, ""),
        ({f"module.{name}": x.half() for name, x in model.state_dict().items()}, ""),
    ):
        torch.save(content, tmp_path / "bad.pth")
        fresh = Model()
        before = copy.deepcopy(fresh)
        with pytest.raises(InputError, match=r"bad\.pth: NaN or infinity in reg_embed\.weight: the training"):
            CoDETRCheckpointer(fresh).load(f"{tmp_path}/bad.pth{options}")
        assert same(fresh, before)
    torch.save({"model": {**Model().state_dict(), **averages}}, tmp_path / "other.pth")
    CoDETRCheckpointer(Model()).load(str(tmp_path / "other.pth"))  # what the model doesn't have does not matter


def test_large_weights_are_finite(tmp_path):
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3e38)  # their sums and squares are not
    CoDETRCheckpointer(model, str(tmp_path)).save("large")
    fresh = Model()
    CoDETRCheckpointer(fresh).load(str(tmp_path / "large.pth"))
    assert same(fresh, model)


def test_writers_into_one_folder_do_not_meet(tmp_path):
    """Nor into one file, which is one of theirs as a whole."""
    barrier = threading.Barrier(2)

    def write(file, byte):
        for _ in range(3):
            barrier.wait(60)  # each writes a third while the other's file lies open
            file.write(byte * 1000)

    for names in (("same", "same"), ("one", "two")):
        with ThreadPoolExecutor(2) as pool:
            jobs = [
                pool.submit(atomic_write, str(tmp_path / name), lambda file, byte=byte: write(file, byte))
                for name, byte in zip(names, (b"a", b"b"))
            ]
        assert [job.result() for job in jobs] == [None, None]
    assert (tmp_path / "same").read_bytes() in (b"a" * 3000, b"b" * 3000)
    assert (tmp_path / "one").read_bytes() == b"a" * 3000 and (tmp_path / "two").read_bytes() == b"b" * 3000
    assert sorted(os.listdir(tmp_path)) == ["one", "same", "two"]


def test_a_crash_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    model = Model()
    checkpointer = CoDETRCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")
    saved = (tmp_path / "model_0000001.pth").read_bytes()
    real_save = torch.save

    def crash(data, file):
        real_save(data, file)
        file.truncate(100)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", crash)
    for name in ("model_0000001", "model_0000003"):
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save(name)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]
    assert (tmp_path / "model_0000001.pth").read_bytes() == saved
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")


def test_round_trip_with_training_state_and_average(tmp_path):
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    average = {key: value + 1 for key, value in model.state_dict().items() if value.is_floating_point()}

    class Average:
        loaded = None

        def state_dict(self):
            return average

        def load_state_dict(self, state):
            self.loaded = state

    CoDETRCheckpointer(model, str(tmp_path), optimizer=optimizer, ema=Average()).save("model_0000001", iteration=1)

    other, ema = Model(), Average()
    other_optimizer = torch.optim.AdamW(other.parameters())
    checkpointer = CoDETRCheckpointer(other, str(tmp_path), optimizer=other_optimizer, ema=ema)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 1
    assert same(model, other)
    assert torch.equal(ema.loaded["class_embed.bias"], average["class_embed.bias"])
    assert other_optimizer.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()

    # A run that is resumed without an average goes on with the weights themselves.
    other = Model()
    checkpointer = CoDETRCheckpointer(other, str(tmp_path), optimizer=torch.optim.AdamW(other.parameters()))
    checkpointer.resume_or_load("", resume=True)
    assert same(model, other)

    # Where weights alone are asked for, to evaluate or to start with, the average is what is loaded.
    other = Model()
    CoDETRCheckpointer(other).load(str(tmp_path / "model_0000001.pth"))
    assert torch.equal(other.class_embed.bias, average["class_embed.bias"])


def test_another_number_of_classes_is_named(tmp_path):
    path = tmp_path / "weights.pth"
    source = Model(80)
    torch.save({"model": source.state_dict()}, path)
    with pytest.raises(InputError) as error:
        CoDETRCheckpointer(Model(5)).load(str(path))
    message = str(error.value)
    for part in (str(path), "class_embed.weight", "[80, 4]", "[5, 4]", "MODEL.CODETR.NUM_CLASSES", "class_embed.bias"):
        assert part in message
    assert "\n" not in message

    # The way out that the message names, for training on other classes.
    assert f"{path}?matching_heuristics=True" in message
    model = Model(5)
    before = model.class_embed.weight.clone()
    CoDETRCheckpointer(model).load(f"{path}?matching_heuristics=True")
    assert torch.equal(model.reg_embed.weight, source.reg_embed.weight)
    assert torch.equal(model.class_embed.weight, before)


@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.model."])
def test_a_backbone_alone_is_one_line_of_information(tmp_path, caplog, prefix):
    source, model = Model(), Model()
    start = "backbone.model."
    weights = {
        prefix + k.removeprefix(start if prefix != "backbone." else "backbone."): v
        for k, v in source.state_dict().items()
        if k.startswith(start)
    }
    torch.save(weights, tmp_path / "backbone.pth")
    with caplog.at_level("INFO"):
        checkpointer = CoDETRCheckpointer(model)
        checkpointer.logger.propagate = True
        checkpointer.load(str(tmp_path / "backbone.pth"))
    assert same(source.backbone, model.backbone)
    records = [r for r in caplog.records if "backbone (" in r.message]
    assert len(records) == 1 and not [r for r in caplog.records if r.levelname == "WARNING"]


def test_missing_and_unexpected_names_are_brief(tmp_path, caplog):
    weights = Model().state_dict()
    del weights["reg_embed.bias"]
    weights.update({f"other.{i}": torch.zeros(1) for i in range(50)})
    torch.save({"model": weights}, tmp_path / "weights.pth")
    with caplog.at_level("WARNING"):
        CoDETRCheckpointer(Model()).load(str(tmp_path / "weights.pth"))
    assert "1 tensors of the model are not in the checkpoint: reg_embed.bias" in caplog.text
    assert "50 tensors of the checkpoint are not in the model: other.0" in caplog.text
    assert "other.30" not in caplog.text


def bytes_of(save, *args):
    buffer = io.BytesIO()
    save(*args, buffer)
    return buffer.getvalue()


WHOLE = bytes_of(torch.save, {"model": Model().state_dict()})
WHOLE_PICKLE = pickle.dumps({"model": {"class_embed.bias": np.zeros(5, np.float32)}, "__author__": "x"})


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.pth", WHOLE[: len(WHOLE) // 2], "truncated, damaged"),
        ("a.pth", b"", "is empty; download the file again"),
        ("a.pth", b"<html>not found</html>", "is an HTML page, .* download the file again"),
        ("a.pth", bytes_of(torch.save, [1, 2]), "holds a list"),
        ("a.pth", bytes_of(torch.save, {"model": {"a": 3}}), "no dict of named tensors"),
        ("a.pth", bytes_of(torch.save, {"model": {"x.weight": torch.zeros(1)}}), "no tensor of it belongs"),
        ("a.pth", bytes_of(torch.save, {1: torch.zeros(1)}), "no dict of named tensors"),
        ("a.pyth", bytes_of(torch.save, {"model_state": Model().state_dict()}), "convert this file of pycls"),
        ("a.pkl", WHOLE_PICKLE[:-20], "not a readable pickle"),
        ("a.pkl", b"<html>", "is an HTML page"),
        ("a.pkl", pickle.dumps([1]), "holds a list"),
    ],
)
def test_faulty_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        CoDETRCheckpointer(Model()).load(str(tmp_path / name))
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


@pytest.mark.parametrize("ema", [0.99, {"decay": 0.99, "module": {"class_embed.bias": torch.ones(5)}}])
def test_averages_of_other_codes_are_not_taken_for_ours(tmp_path, ema):
    """Nor does a file decide how strictly it is read."""
    source, model = Model(), Model()
    path = tmp_path / "weights.pth"
    torch.save({"model": source.state_dict(), "ema": ema, "matching_heuristics": torch.ones(2)}, path)
    CoDETRCheckpointer(model).load(str(path))
    assert same(source, model)


def test_missing_file():
    with pytest.raises(InputError, match="none.pth: no such checkpoint"):
        CoDETRCheckpointer(Model()).load("none.pth")


@pytest.mark.parametrize("address", ["nosuch://a/model.pth", "http://127.0.0.1:9/model.pth"])
def test_addresses_that_give_nothing(address, tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=rf"^{address}: cannot be fetched .*check the address") as error:
        CoDETRCheckpointer(Model()).load(address)
    assert "\n" not in str(error.value)


def test_last_checkpoint_that_is_gone(tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    with pytest.raises(InputError, match="model_0000009.pth: no such checkpoint.*last_checkpoint"):
        CoDETRCheckpointer(Model(), str(tmp_path)).resume_or_load("", resume=True)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_refused(tmp_path, legacy):
    path, trace = tmp_path / "weights.pth", tmp_path / "it_ran"
    torch.save({"model": {}, "meta": Runs(trace)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"holds Python objects.*system.*save the state dict alone"):
        CoDETRCheckpointer(Model()).load(str(path))
    assert not trace.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_a_pickle_is_refused(tmp_path, protocol):
    path, trace = tmp_path / "weights.pkl", tmp_path / "it_ran"
    for content in (Runs(trace), {"model": {"a": Runs(trace)}, "__author__": "x"}):
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        with pytest.raises(InputError, match="not a readable pickle of numpy arrays.*system"):
            load_numpy_pickle(str(path))
    path.write_bytes(b"cbuiltins\neval\n(S'1'\ntR.")
    with pytest.raises(InputError, match=r"builtins\.eval"):
        load_numpy_pickle(str(path))
    assert not trace.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_model_zoo_pickles_are_read(tmp_path, protocol):
    source, model = Model(), Model()
    arrays = {key: value.numpy() for key, value in source.state_dict().items() if not key.endswith("_tracked")}
    path = tmp_path / "weights.pkl"
    extra = {"scalar": np.float64(3), "order": (1, [2, b"bytes"], "text")}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody", **extra}, protocol=protocol))
    data = load_numpy_pickle(str(path))
    assert data["scalar"] == 3 and data["order"] == (1, [2, b"bytes"], "text")
    CoDETRCheckpointer(model).load(str(path))
    assert same(source, model)


def test_backbones_of_the_model_zoo_are_matched_by_name(tmp_path):
    source, model = Model(), Model()
    arrays = {k: v.numpy() for k, v in source.backbone.model.state_dict().items() if not k.endswith("_tracked")}
    path = tmp_path / "backbone.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody", "matching_heuristics": True}, protocol=2))
    CoDETRCheckpointer(model).load(str(path))
    assert same(source.backbone, model.backbone)


def build_detector(num_classes=4, heads=("roi", "atss"), **options):
    """A small Co-Deformable-DETR, its parameters drawn at random."""
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/co_deformable_detr/co_deformable_detr_r50_1x_coco.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    codetr = cfg.MODEL.CODETR
    codetr.NUM_CLASSES = num_classes
    codetr.AUX_HEADS = list(heads)
    codetr.EMBED_DIM = 32
    for part in (codetr.ENCODER, codetr.DECODER):
        part.NUM_LAYERS, part.NUM_HEADS, part.FFN_DIM = 2, 4, 16
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.merge_from_list([x for pair in options.items() for x in pair])
    return build_model(cfg)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(1)  # other parameters than those of the models that load them
    return build_detector()


@pytest.fixture
def published_file(detector, tmp_path):
    """The detector as the published code would have saved it."""
    weights = codetr_to_published(detector.state_dict())
    for name in [name for name in weights if name.endswith("running_var")]:
        weights[name.removesuffix("running_var") + "num_batches_tracked"] = torch.tensor(0)
    path = tmp_path / "published.pth"
    torch.save({"meta": {"epoch": 1}, "state_dict": weights, "optimizer": {"state": {}}}, path)
    return path


@pytest.fixture
def load(caplog):
    """Load a file into a model; returns the log."""

    def load(model, path, **options):
        caplog.clear()
        checkpointer = CoDETRCheckpointer(model, **options)
        checkpointer.logger.propagate = True
        with caplog.at_level("INFO"):
            checkpointer.load(str(path))
        return caplog

    return load


def warnings_of(log):
    return [record.message for record in log.records if record.levelname == "WARNING"]


def test_published_weights_are_converted_while_loading(detector, published_file, tmp_path, load):
    model = build_detector()
    assert not same(detector, model)
    log = load(model, published_file)
    assert same(detector, model) and not warnings_of(log)
    assert "Not used: entries beside the weights: meta, optimizer" in log.text
    assert "a counter of batch norm in training" in log.text

    # What the tool writes is a checkpoint like any other.
    converted = tmp_path / "converted.pth"
    torch.save(checkpoint_to_codetr(torch.load(published_file, weights_only=True))[0], converted)
    model = build_detector()
    assert not warnings_of(load(model, converted)) and same(detector, model)
    model = build_detector()
    DetectionCheckpointer(model).load(str(converted))
    assert same(detector, model)


def with_numbers(state_dict):
    """The names that files had before: positive queries numbered in the order of their auxiliary heads."""
    heads = list(dict.fromkeys(name.split(".")[1] for name in state_dict if name.startswith("auxiliary_heads.")))
    start = "query_head.positive_queries."
    numbered = {}
    for name, value in state_dict.items():
        if name.startswith(start):
            head, rest = name.removeprefix(start).split(".", 1)
            name = f"{start}{heads.index(head)}.{rest}"
        numbered[name] = value
    return numbered


@pytest.mark.slow
@pytest.mark.parametrize("source", ["published", "ours", "numbered"])
@pytest.mark.parametrize("heads", [[], ["atss"], ["atss", "roi"], ["roi"], ["atss", "atss"]])
def test_auxiliary_heads_are_found_by_name(detector, published_file, tmp_path, load, heads, source):
    path = published_file
    if source != "published":
        state = detector.state_dict()
        path = tmp_path / "ours.pth"
        torch.save({"model": with_numbers(state) if source == "numbered" else state}, path)
    model = build_detector(heads=heads)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    log = load(model, path)
    expected = detector.state_dict()
    names = list(model.auxiliary_heads)
    for name, value in model.state_dict().items():
        assert torch.equal(value, (fresh if ".atss2." in name else expected)[name]), name
    dropped = {"roi", "atss"} - set(names)
    assert ("an auxiliary head that MODEL.CODETR.AUX_HEADS does not list" in log.text) == bool(dropped)
    assert ("MODEL.CODETR.AUX_HEADS is empty): auxiliary_level" in log.text) == (not heads)
    # Only what starts anew is worth a warning.
    assert len(warnings_of(log)) == ("atss2" in names)


@pytest.mark.parametrize("heads", [["atss", "roi"], ["atss"], ["roi", "roi"], ["atss", "roi", "atss"]])
def test_numbers_of_positive_queries_follow_the_heads_of_their_file(tmp_path, load, heads):
    source, model = build_detector(heads=heads), build_detector(heads=heads[::-1])
    state = with_numbers(source.state_dict())
    assert {name.split(".")[2] for name in state if "positive_queries" in name} == {*map(str, range(len(heads)))}
    torch.save({"model": state}, tmp_path / "old.pth")
    assert not warnings_of(load(model, tmp_path / "old.pth"))
    assert same(source, model)


def test_averages_of_a_run_of_before_are_resumed(detector, tmp_path):
    """A run that numbers its positive queries goes on with its moving average, too."""
    ema = ModelEMA(detector, 0.9, 10)
    averages = {name: value + 1 for name, value in ema.state_dict().items()}
    torch.save({"model": with_numbers(detector.state_dict()), "ema": with_numbers(averages)}, tmp_path / "old.pth")
    (tmp_path / "last_checkpoint").write_text("old.pth")
    CoDETRCheckpointer(detector, str(tmp_path), ema=ema).resume_or_load("", resume=True)
    for name, value in ema.state_dict().items():
        assert torch.equal(value, averages[name]), name


@pytest.fixture
def pets():
    MetadataCatalog.get("checkpointer_pets").thing_classes = ["cat", "hot_dog", "bird_(animal)", "fish"]
    yield "checkpointer_pets"
    MetadataCatalog.pop("checkpointer_pets")


CLASS_BIAS = "query_head.decoder.class_embed.1.bias"


def distinct_biases(model, name=CLASS_BIAS):
    with torch.no_grad():
        model.state_dict()[name].copy_(torch.arange(len(model.state_dict()[name])) + 10.0)


@pytest.mark.parametrize("source", ["published", "ours"])
def test_other_classes_in_training(published_file, tmp_path, load, pets, source):
    weights = build_detector()
    distinct_biases(weights)
    state = weights.state_dict()
    path = tmp_path / "weights.pth"
    torch.save({"model": state} if source == "ours" else {"state_dict": codetr_to_published(state)}, path)

    model = build_detector(3)
    fresh = model.state_dict()[CLASS_BIAS].clone()
    log = load(model, path, fine_tune=True, class_names=["Bird", "Hot dog", "tree"])
    assert torch.equal(model.state_dict()[CLASS_BIAS], fresh)
    assert torch.equal(model.query_head.query_content.weight, weights.query_head.query_content.weight)
    assert len(warnings_of(log)) == 1
    assert "has 4 classes and the model 3: the classifiers start anew" in warnings_of(log)[0]

    log = load(model, path, fine_tune=True, class_names=["Bird", "Hot dog", "tree"], reuse_classes=pets)
    assert model.state_dict()[CLASS_BIAS].tolist() == [12, 11, fresh[2].item()]
    assert len(warnings_of(log)) == 1 and "2 of 3 classes by their names in checkpointer_pets" in warnings_of(log)[0]

    # As many classes in another order.
    model = build_detector(4)
    log = load(model, path, fine_tune=True, class_names=["fish", "bird", "hot dog", "cat"], reuse_classes=pets)
    assert model.state_dict()[CLASS_BIAS].tolist() == [13, 12, 11, 10] and "4 of 4" in warnings_of(log)[0]
    # Without REUSE_CLASSES, and where nothing is trained, the weights stay as they are.
    for options in ({"fine_tune": True}, {"reuse_classes": pets, "class_names": ["a", "b", "c", "d"]}):
        assert not warnings_of(load(model, path, **options))
        assert model.state_dict()[CLASS_BIAS].tolist() == [10, 11, 12, 13]

    for other, names, message in (
        (model, ["fish"], "MODEL.CODETR.CLASS_NAMES names 1 classes, but MODEL.CODETR.NUM_CLASSES is 4"),
        (build_detector(3), ["a", "b", "c"], r"coco_2017_train names 80 classes, but .*weights.pth has 4 classes"),
    ):
        reuse = pets if len(names) == 1 else "coco_2017_train"
        with pytest.raises(InputError, match=message):
            load(other, path, fine_tune=True, class_names=names, reuse_classes=reuse)


def test_other_classes_are_an_error_in_evaluation_and_resuming(published_file, tmp_path, load, pets):
    with pytest.raises(
        InputError, match=r"published.pth: has 4 classes, but MODEL.CODETR.NUM_CLASSES is 3; set it to 4"
    ):
        load(build_detector(3), published_file)
    weights = build_detector()
    distinct_biases(weights)
    optimizer = torch.optim.SGD(weights.parameters(), 0.1)
    options = {"fine_tune": True, "reuse_classes": pets, "class_names": ["fish", "bird", "hot dog", "cat"]}
    CoDETRCheckpointer(weights, str(tmp_path), optimizer=optimizer).save("model_0000001")
    model = build_detector()
    resumed = CoDETRCheckpointer(model, str(tmp_path), optimizer=torch.optim.SGD(model.parameters(), 0.1), **options)
    resumed.resume_or_load("", resume=True)
    assert same(model, weights)  # the rows are in the order of the run already
    model = build_detector(3)
    resumed = CoDETRCheckpointer(model, str(tmp_path), optimizer=torch.optim.SGD(model.parameters(), 0.1), **options)
    with pytest.raises(InputError, match="has 4 classes, but"):
        resumed.resume_or_load("", resume=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"MODEL.CODETR.NUM_QUERIES": 10}, r"query_content.weight .*\[300, 32\].*\[10, 32\].*MODEL.CODETR.NUM_QUERIES"),
        ({"MODEL.CODETR.ENCODER.NUM_LAYERS": 1}, "has query_head.encoder.layers.1.*ENCODER.NUM_LAYERS"),
        ({"MODEL.CODETR.DECODER.NUM_LAYERS": 3}, "lacks query_head.decoder.layers.2.*DECODER.NUM_LAYERS"),
        ({"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}, "bbox_pred.*CLS_AGNOSTIC_BBOX_REG"),
        ({"MODEL.ROI_BOX_HEAD.NUM_FC": 1}, "box_head.*NUM_FC"),
        ({"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0]]}, "objectness_logits.*MODEL.ANCHOR_GENERATOR"),
        ({"MODEL.RESNETS.DEPTH": 34}, "lacks backbone.*MODEL.BACKBONE.NAME"),
    ],
)
def test_another_model_names_its_option(published_file, load, options, message):
    model = build_detector(**options)
    with pytest.raises(InputError, match=rf"published.pth: .*{message}") as error:
        load(model, published_file)
    assert "\n" not in str(error.value) and "?matching_heuristics=True" in str(error.value)
    load(model, f"{published_file}?matching_heuristics=True")


def test_another_family_and_another_version(published_file, load, tmp_path):
    weights = torch.load(published_file, weights_only=True)["state_dict"]
    dino = build_detector(**{"MODEL.CODETR.QUERY_HEAD": "CoDINOHead"})
    for state in (dino.state_dict(), codetr_to_published(dino.state_dict())):
        torch.save(state, tmp_path / "dino.pth")
        with pytest.raises(InputError, match="dino.pth: .*QUERY_HEAD CoDINOHead"):
            load(build_detector(), tmp_path / "dino.pth")
    with pytest.raises(InputError, match="published.pth: .*QUERY_HEAD CoDeformableDETRHead"):
        load(dino, published_file)
    renamed = {name.replace("attentions.0", "self_attn"): value for name, value in weights.items()}
    torch.save(renamed, tmp_path / "renamed.pth")
    with pytest.raises(
        InputError, match=r"renamed.pth: .*another version.*lacks query_head.encoder.layers.0.self_attn"
    ):
        load(build_detector(), tmp_path / "renamed.pth")


def test_a_file_of_something_else_is_no_backbone(tmp_path, load):
    """Its frozen norms have statistics without a file, too."""
    torch.save({"x.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="no tensor of it belongs to this model: it has x.weight; the model has"):
        load(build_detector(), tmp_path / "other.pth", fine_tune=True)


def test_torchvision_backbone_of_a_detector(tmp_path, load):
    theirs = torchvision.models.resnet18(weights=None)
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    model = build_detector()
    log = load(model, tmp_path / "resnet18.pth", fine_tune=True)
    assert torch.equal(model.backbone.res5[1].conv2.weight, theirs.layer4[1].conv2.weight)
    assert "Loaded the backbone (100 tensors); the rest starts anew" in log.text and not warnings_of(log)
    assert "2 (part of its pretraining's task): fc.weight, fc.bias" in log.text
