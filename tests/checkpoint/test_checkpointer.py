import io
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from codetr_d2.checkpoint.checkpointer import CoDETRCheckpointer, atomic_write
from codetr_d2.checkpoint.safe_load import load_numpy_pickle
from codetr_d2.errors import InputError


class Model(nn.Module):
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
        ("a.pth", b"", "truncated, damaged"),
        ("a.pth", b"<html>not found</html>", "truncated, damaged"),
        ("a.pth", bytes_of(torch.save, [1, 2]), "holds a list"),
        ("a.pth", bytes_of(torch.save, {"model": {"a": 3}}), "no dict of named tensors"),
        ("a.pth", bytes_of(torch.save, {"model": {"x.weight": torch.zeros(1)}}), "no tensor of it belongs"),
        ("a.pkl", WHOLE_PICKLE[:-20], "not a readable pickle"),
        ("a.pkl", b"<html>", "not a readable pickle"),
        ("a.pkl", pickle.dumps([1]), "holds a list"),
    ],
)
def test_faulty_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        CoDETRCheckpointer(Model()).load(str(tmp_path / name))
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


def test_missing_file():
    with pytest.raises(InputError, match="none.pth: no such checkpoint"):
        CoDETRCheckpointer(Model()).load("none.pth")


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
