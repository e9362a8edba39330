"""Several processes of a machine, of which one loads."""

import os

import pytest
from detectron2.utils import comm

from codetr_d2.data.shared import SharedRecords, once_on_each_machine
from codetr_d2.engine import run_processes
from codetr_d2.errors import InputError

RECORDS = [{"file_name": f"{i}.png", "annotations": [{"bbox": [i, 2.5, 3, 4]}] * i} for i in range(5)]


def test_records_come_back_as_they_were():
    records = SharedRecords(RECORDS)
    assert list(records) == RECORDS and len(records) == 5 and records[-1] == RECORDS[-1]
    records[1]["file_name"] = "changed"  # a dict of its own
    assert records[1] == RECORDS[1]
    with pytest.raises(IndexError):
        records[5]
    assert SharedRecords.of(records) is records
    assert list(SharedRecords([])) == []


def test_records_are_saved_and_opened(tmp_path):
    for records in (RECORDS, []):
        SharedRecords(records).save(str(tmp_path))
        opened = SharedRecords.open(str(tmp_path))
        for name in os.listdir(tmp_path):
            os.remove(tmp_path / name)
        assert list(opened) == records


def test_one_process_needs_no_sharing():
    assert once_on_each_machine(lambda: (RECORDS, {"a": 1})) == (RECORDS, {"a": 1})


def load_once(folder, is_faulty):
    def load():
        with open(os.path.join(folder, f"loaded by {comm.get_rank()}"), "x"):
            pass
        if is_faulty:
            raise InputError("the file is at fault")
        return RECORDS, {"classes": ["a"]}

    records, extra = once_on_each_machine(load)
    assert list(records) == RECORDS and extra == {"classes": ["a"]}
    with open(os.path.join(folder, f"seen by {comm.get_rank()}"), "x"):
        pass


@pytest.mark.slow
def test_one_of_two_processes_loads(tmp_path, monkeypatch):
    monkeypatch.setattr("codetr_d2.data.shared._SHARED_MEMORY", str(tmp_path / "shared"))
    run_processes(load_once, 2, device="cpu", args=(str(tmp_path), False))
    assert sorted(os.listdir(tmp_path)) == ["loaded by 0", "seen by 0", "seen by 1"]


@pytest.mark.slow
def test_an_error_of_the_one_is_that_of_all(tmp_path):
    with pytest.raises(InputError, match="the file is at fault"):
        run_processes(load_once, 2, device="cpu", args=(str(tmp_path), True))
    assert os.listdir(tmp_path) == ["loaded by 0"]
