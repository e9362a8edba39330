import json

import pytest

from codetr_d2.errors import InputError
from codetr_d2.inference import DetectionsFile
from tests.small_disk import small_disk

ENTRIES = [{"file_name": "\u732b.png", "detections": [{"score": 0.5}]}, {"file_name": "b", "detections": []}]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_equals_what_json_writes(tmp_path, number):
    path = tmp_path / "new" / "x.json"
    with DetectionsFile(path) as file:
        for entry in ENTRIES[:number]:
            file.add(entry)
            (unfinished,) = path.parent.iterdir()
            assert json.loads(unfinished.read_text()) == ENTRIES[: file.number]
    assert file.number == number
    assert json.loads(path.read_text()) == ENTRIES[:number]
    if number:
        assert path.read_text() == json.dumps(ENTRIES[:number], indent=1) + "\n"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError, RuntimeError])
def test_what_is_done_when_an_error_comes_is_kept(tmp_path, error):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(error), DetectionsFile(path):
        raise error
    assert path.read_text() == "old"
    with pytest.raises(error), DetectionsFile(path) as file:
        file.add(ENTRIES[0])
        raise error
    assert json.loads(path.read_text()) == ENTRIES[:1]
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_in_the_middle_of_an_entry(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    with pytest.raises(KeyboardInterrupt), DetectionsFile(path) as file:
        file.add(ENTRIES[0])
        write = file._write

        def interrupted(place, content):
            monkeypatch.undo()
            write(place, content[:20])
            raise KeyboardInterrupt

        monkeypatch.setattr(file, "_write", interrupted)
        file.add(ENTRIES[1])
    assert json.loads(path.read_text()) == ENTRIES[:1]


def test_a_full_disk(tmp_path):
    message = "x.json cannot be written .No space left on device"
    with small_disk(tmp_path / "disk", 64) as folder:
        with pytest.raises(InputError, match=message), DetectionsFile(folder / "x.json") as file:
            for _ in range(10000):
                file.add(ENTRIES[0] | {"note": "x" * 500})
        assert len(json.loads((folder / "x.json").read_text())) == file.number > 0
        assert len(list(folder.iterdir())) == 1


def test_two_runs_into_one_folder_share_no_file(tmp_path, monkeypatch):
    with DetectionsFile(tmp_path / "x.json") as first:
        monkeypatch.setattr("os.getpid", lambda: 1)
        with DetectionsFile(tmp_path / "x.json") as second:
            first.add(ENTRIES[0])
            second.add(ENTRIES[1])
        assert json.loads((tmp_path / "x.json").read_text()) == ENTRIES[1:]
    assert json.loads((tmp_path / "x.json").read_text()) == ENTRIES[:1]
