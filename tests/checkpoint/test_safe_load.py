import os
import pickle
import re
import subprocess
import sys
import types
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch

from codetr_d2.checkpoint.safe_load import load_torch, weights_entry
from codetr_d2.errors import InputError


class Runs:
    """An object whose pickle calls a function when it is read freely."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture
def strange(monkeypatch):
    """A module of classes that is gone again when the file is read."""
    module = types.ModuleType("made_up_framework")

    class HistoryBuffer:
        def __init__(self):
            self.values = [1, 2]

    class Slots:
        __slots__ = ("a",)

    class Config(dict):
        pass

    class Items(list):
        pass

    for kind in (HistoryBuffer, Slots, Config, Items):
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        yield module


WEIGHTS = OrderedDict({"a.weight": torch.arange(3.0), "a.bias": torch.ones(2)})


def save(data, path, legacy, monkeypatch):
    torch.save(data, path, _use_new_zipfile_serialization=not legacy)
    monkeypatch.delitem(sys.modules, "made_up_framework", raising=False)


@pytest.mark.parametrize("legacy", [False, True])
def test_objects_of_unknown_classes_are_left_out(tmp_path, strange, monkeypatch, legacy):
    slots = strange.Slots()
    slots.a = 3
    config = strange.Config(lr=0.1, hook=strange.HistoryBuffer())
    config.filename = "x.py"
    counts = defaultdict(list, {"loss": [1.0, 2.0]})
    meta = {
        "epoch": 12,
        "CLASSES": ("cat", "dog"),
        "history": strange.HistoryBuffer(),
        "list": [1, strange.HistoryBuffer(), {"slots": slots, "kept": 2}],
        "items": strange.Items([1, 2]),
        "kind": strange.HistoryBuffer,
        "best": np.float64(0.5),
        "flags": [np.bool_(True), np.int32(-3), np.float32(0.25), np.str_("x")],
        "array": np.arange(3),
        "config": config,
        "counts": counts,
        strange.HistoryBuffer(): 1,
    }
    path = str(tmp_path / "x.pth")
    save({"meta": meta, "state_dict": WEIGHTS}, path, legacy, monkeypatch)
    data, dropped = load_torch(path)
    assert list(data) == ["meta", "state_dict"] and weights_entry(data) == "state_dict"
    assert all(torch.equal(data["state_dict"][key], WEIGHTS[key]) for key in WEIGHTS)
    kept = {"epoch": 12, "CLASSES": ("cat", "dog"), "list": [1, {"kept": 2}], "best": 0.5, "flags": [True, -3, 0.25]}
    assert type(data["meta"]["best"]) is float and type(data["meta"]["flags"][0]) is bool
    assert data["meta"] == {**kept, "config": {"lr": 0.1}, "counts": {"loss": [1.0, 2.0]}}
    assert len(dropped) == 9
    assert "meta.history (made_up_framework.HistoryBuffer)" in dropped
    assert "made_up_framework" not in sys.modules
    # What was read can be written, and read again without any of this.
    torch.save(data, path)
    assert load_torch(path)[1] == []


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["meta", "state_dict"])
@pytest.mark.parametrize("function", [os.system, subprocess.call, eval, exec])
def test_nothing_runs(tmp_path, monkeypatch, legacy, place, function):
    marker = tmp_path / "it_ran"
    commands = {os.system: f"touch {marker}", subprocess.call: ["touch", str(marker)]}
    command = commands.get(function, f"open({str(marker)!r}, 'w')")
    harmful = {"x": Runs(function, command)}
    data = {"meta": {}, "state_dict": dict(WEIGHTS)}
    data[place] = {**data[place], **harmful}
    path = str(tmp_path / "x.pth")
    save(data, path, legacy, monkeypatch)
    if function is not os.system and place == "meta":
        data, dropped = load_torch(path)
        assert data["meta"] == {} and torch.equal(data["state_dict"]["a.bias"], WEIGHTS["a.bias"])
        assert len(dropped) == 1 and re.fullmatch(rf"meta\.x \(\w+\.{function.__name__}\)", dropped[0])
    else:
        with pytest.raises(InputError, match=r"x\.pth: .*Python object"):
            load_torch(path)
    assert not marker.exists()

    # The file does run code where it is read freely: this test can fail.
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_truncated_files(tmp_path, strange, monkeypatch, legacy, share):
    path = tmp_path / "x.pth"
    save({"meta": {"history": strange.HistoryBuffer()}, "state_dict": WEIGHTS}, path, legacy, monkeypatch)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=r"x\.pth: .*(truncated|Python objects)"):
        load_torch(str(path))


def test_a_container_that_holds_itself(tmp_path, strange, monkeypatch):
    loop = [strange.HistoryBuffer()]
    loop.append(loop)
    path = str(tmp_path / "x.pth")
    save({"meta": loop, "state_dict": WEIGHTS}, path, False, monkeypatch)
    with pytest.raises(InputError, match=r"x\.pth: "):
        load_torch(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_of_other_protocols_are_refused(tmp_path):
    path, marker = tmp_path / "x.pth", tmp_path / "it_ran"
    for protocol in (0, 2, 4):
        path.write_bytes(pickle.dumps({"model": Runs(subprocess.getoutput, f"touch {marker}")}, protocol=protocol))
        with pytest.raises(InputError, match=r"x\.pth: "):
            load_torch(str(path))
    assert not marker.exists()
