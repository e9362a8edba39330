import gzip
import os
import pickle
import re
import subprocess
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch

from codetr_d2.checkpoint.safe_load import load_numpy_pickle, load_torch, weights_entry
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
    kept["items"] = [1, 2]
    assert type(data["meta"]["best"]) is float and type(data["meta"]["flags"][0]) is bool
    assert data["meta"] == {**kept, "config": {"lr": 0.1}, "counts": {"loss": [1.0, 2.0]}}
    assert len(dropped) == 8
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
def test_containers_that_stand_in_many_places_are_read_once(tmp_path, strange, monkeypatch):
    """Forty lists, each of them twice in the next: a small file that would take years to walk."""
    nested = [1]
    for _ in range(40):
        nested = [nested, nested]
    path = tmp_path / "file.pth"
    save(
        {"state_dict": WEIGHTS, "meta": {"object": strange.HistoryBuffer(), "nested": nested}}, path, False, monkeypatch
    )
    data, dropped = load_torch(path)
    assert dropped == ["meta.object (made_up_framework.HistoryBuffer)"]
    first, second = data["meta"]["nested"]
    assert first is second


def test_the_weights_of_an_archive_are_read_once(tmp_path, strange, monkeypatch):
    """Also where an unknown object comes behind them."""
    path, calls, load = tmp_path / "file.pth", [], torch.load
    save({"state_dict": WEIGHTS, "hook": strange.HistoryBuffer()}, path, False, monkeypatch)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: calls.append(args) or load(*args, **kwargs))
    assert load_torch(path)[1] == ["hook (made_up_framework.HistoryBuffer)"]
    assert len(calls) == 1


class PickledArray:
    """An array whose pickle says of its type and content what it likes."""

    def __init__(self, code, state, content):
        self.code, self.state, self.content = code, state, content

    def __reduce__(self):
        dtype = Runs(np.dtype, self.code, False, True)
        dtype.call = (np.dtype, (self.code, False, True), self.state)
        return np.array(0).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, (1,), dtype, False, self.content)


@pytest.mark.parametrize(
    ("code", "state", "content"),
    [
        ("O8", (3, "|", None, None, None, -1, -1, 0), b"A" * 8),  # bytes taken for the address of an object
        ("O8", (3, "|", None, None, None, -1, -1, 1), b"A" * 8),
        ("V8", (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0), b"A" * 8),
        ("f4", (3, ">", None, None, None, -1, -1, 0), b"A" * 4),
        ("f8", (3, "<", None, None, None, -1, -1, 0), b"A" * 4),  # too short
    ],
)
def test_numpy_types_other_than_plain_numbers_are_refused(tmp_path, code, state, content):
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"a": PickledArray(code, state, content)}, protocol=2))
    with pytest.raises(InputError, match="weights.pkl: not a readable pickle of numpy arrays"):
        load_numpy_pickle(str(path))


@pytest.mark.parametrize("dtype", ["f4", "f2", "f8", "i8", "u1", "b1"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_numpy_arrays_are_read_as_they_were(tmp_path, dtype, protocol):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    content = {"blobs": {"a": array, "b": np.asfortranarray(array)}, "number": array[0, 1], "list": [array[:0]]}
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    read = load_numpy_pickle(str(path))
    for name in ("a", "b"):
        np.testing.assert_array_equal(read["blobs"][name], array)
        assert read["blobs"][name].dtype == array.dtype and read["blobs"][name].flags.writeable
    assert read["number"] == array[0, 1] and len(read["list"][0]) == 0


def test_pickles_of_other_protocols_are_refused(tmp_path):
    path, marker = tmp_path / "x.pth", tmp_path / "it_ran"
    for protocol in (0, 2, 4):
        path.write_bytes(pickle.dumps({"model": Runs(subprocess.getoutput, f"touch {marker}")}, protocol=protocol))
        with pytest.raises(InputError, match=r"x\.pth: "):
            load_torch(str(path))
    assert not marker.exists()


def write_zip(path, *names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")


def write_tar(path):
    with tarfile.open(path, "w:gz") as archive:
        archive.add(__file__, "weights.pth")


def write_onnx(path):
    """A model of one addition, in the format's own bytes: version 8, by "pytorch", a graph."""
    path.write_bytes(b'\x08\x08\x12\x07pytorch\x1a\x052.3.0:\x1a\n\x0b\n\x01x\n\x01x\x12\x01y"\x03Add\x12\x01g')


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head></html>"


@pytest.mark.parametrize("name", ["x.pth", "x.pkl", "x.bin"])
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "is empty; download the file again"),
        (lambda path: path.write_bytes(PAGE), "is an HTML page, .*; download the file again"),
        (lambda path: path.write_bytes(b"\xef\xbb\xbf<?xml version='1.0'?><Error/>"), "is an HTML page"),
        (lambda path: path.write_bytes(POINTER), r"is a pointer of git LFS .*; download the file again \(git lfs pull"),
        (lambda path: path.write_text('{"error": "not found"}'), """is a text file, which begins '{"error": "not"""),
        (lambda path: write_zip(path, "folder/weights.pth"), r"is a zip archive of other files \(folder/weights.pth"),
        (lambda path: np.savez(open(path, "wb"), a=np.zeros(2)), "is a file of numpy's savez"),
        (write_tar, "is a tar archive; unpack it"),
        (lambda path: path.write_bytes(gzip.compress(b"x" * 100)), "is compressed with gzip; unpack it"),
        (write_onnx, "is an ONNX model"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), "is an HDF5 file"),
        (lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), path), "is a TorchScript program"),
    ],
    ids=["empty", "page", "xml", "lfs", "json", "zip", "npz", "tar", "gzip", "onnx", "hdf5", "torchscript"],
)
def test_other_files_are_told_for_what_they_are(tmp_path, write, message, name):
    path = tmp_path / name
    write(path)
    with pytest.raises(InputError, match=f"{name}: {message}") as error:
        (load_numpy_pickle if name == "x.pkl" else load_torch)(str(path))
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


def test_torchs_advice_is_not_passed_on(tmp_path):
    path = tmp_path / "x.pth"
    for content in (bytes(range(256)), b"\x80\x02" + bytes(50), b"\x00" * 2000):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"x\.pth: ") as error:
            load_torch(str(path))
        assert "weights_only" not in str(error.value) and "arbitrary code" not in str(error.value)


def test_safetensors(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    path = tmp_path / "x.pth"
    save_file(dict(WEIGHTS), path)
    data, dropped = load_torch(str(path))
    assert dropped == [] and data.keys() == WEIGHTS.keys()
    assert all(torch.equal(data[name], WEIGHTS[name]) for name in WEIGHTS)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"x\.pth: a truncated or damaged safetensors file"):
        load_torch(str(path))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match=r"x\.pth: a safetensors file, .*: pip install safetensors"):
        load_torch(str(path))
