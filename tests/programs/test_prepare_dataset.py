import json

import pytest
import torch

import train_net
from codetr_d2_programs import prepare_dataset, prepare_efficientnet
from tests.data.formats import exports


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    weights = tmp_path / "weights.pth"
    torch.save({"model": {}}, weights)
    monkeypatch.setattr(prepare_efficientnet, "DEFAULT_FILE", weights)
    return prepare_dataset


def test_a_folder_becomes_a_dataset(prepare, tmp_path, capsys):
    exports.yolo_squares(tmp_path / "yolo")
    prepare.main([str(tmp_path / "yolo"), "--output", str(tmp_path / "mine"), "--device", "cpu", "--val", "0.25"])
    out = capsys.readouterr().out
    assert "Read as YOLO" in out and "| pictures |       9 |     3 |" in out
    assert f"codetr_d2 train --config-file {tmp_path}/mine/config.yaml" in out
    train, val = (json.loads((tmp_path / "mine" / f"{x}.json").read_text()) for x in ("train", "val"))
    assert len(train["images"]) == 9 and len(val["images"]) == 3
    assert not {x["file_name"] for x in train["images"]} & {x["file_name"] for x in val["images"]}
    assert [x["name"] for x in train["categories"]] == ["square", "disc"]


def test_groups_by_folder(prepare, tmp_path):
    exports.yolo_squares(tmp_path / "yolo")
    prepare.main([str(tmp_path / "yolo"), "--output", str(tmp_path / "mine"), "--device", "cpu", "--group-by-folder"])
    folders = [
        {
            x["file_name"].partition("/")[0]
            for x in json.loads((tmp_path / "mine" / f"{split}.json").read_text())["images"]
        }
        for split in ("train", "val")
    ]
    # The validation set has one folder alone, so that its name is left out.
    assert folders[0] < {"camera0", "camera1", "camera2"} and len(folders[0]) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (["--images", "nowhere"], "error: --images nowhere: there is no such folder"),
        (["--device", "cpu", "--memory-gb", "8"], "error: --memory-gb is for a GPU"),
        (["--format", "voc"], "holds nothing of the format voc"),
        (["--val", "15"], "'15' is no share"),
        (["--memory-gb", "0"], "'0' is no memory"),
        (["--tile", "16"], "'16' is no side of a tile"),
    ],
)
def test_bad_input_is_one_line(options, message, prepare, tmp_path, capsys):
    exports.coco(tmp_path / "coco")
    with pytest.raises(SystemExit) as stopped:
        prepare.main([str(tmp_path / "coco"), "--output", str(tmp_path / "mine"), *options])
    assert stopped.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "mine").exists()


def test_what_was_left_out_is_said(prepare, tmp_path, capsys):
    exports.coco(tmp_path / "coco")
    (tmp_path / "coco" / "images" / "b.jpg").write_bytes(b"")
    prepare.main([str(tmp_path / "coco"), "--output", str(tmp_path / "mine"), "--device", "cpu"])
    assert "1 x unreadable picture; first: " in capsys.readouterr().out


def test_tiles(prepare, tmp_path, capsys):
    """Pictures are split before they are cut, and what looks wrong in them is told by their names."""
    exports.yolo_squares(tmp_path / "yolo", 4)
    exports.write_text(tmp_path / "yolo" / "labels" / "camera0" / "3.txt", "0 0.5 0.5 0.2 0\n0 0.25 0.25 0.1 0.1")
    prepare.main([str(tmp_path / "yolo"), "--output", str(tmp_path / "mine"), "--device", "cpu", "--tile", "32"])
    found = {x: json.loads((tmp_path / "mine" / f"{x}.json").read_text()) for x in ("train", "val")}
    files = {split: [x["file_name"] for x in coco["images"]] for split, coco in found.items()}
    assert len(files["train"]) == 3 * 3 * 2 and len(files["val"]) == 2 * 2  # of 64 x 48 pixels each
    origins = {split: {x.split("/")[-1].split("_")[0] for x in names} for split, names in files.items()}
    assert len(origins["train"]) == 3 and len(origins["val"]) == 1 and not origins["train"] & origins["val"]
    for split, names in files.items():
        assert all((tmp_path / "mine" / split / x).is_file() for x in names)
        assert not any((tmp_path / "mine" / split / x).is_symlink() for x in names)
    out = capsys.readouterr().out
    assert "1 x box without area; first: 3.png: " in out and "on two CPU cores)" in out


@pytest.mark.slow
def test_the_config_trains(prepare, tmp_path, monkeypatch, caplog):
    """From a YOLO folder to the files of a run, by the command that the program names; the model is made small here."""
    exports.yolo_squares(tmp_path / "yolo")
    prepare.main([str(tmp_path / "yolo"), "--output", str(tmp_path / "mine"), "--device", "cpu"])
    monkeypatch.chdir(tmp_path)
    options = {
        "MODEL.WEIGHTS": "",
        "MODEL.CODETR.EMBED_DIM": 32,
        "MODEL.CODETR.ENCODER.NUM_LAYERS": 1,
        "MODEL.CODETR.DECODER.NUM_LAYERS": 1,
        "SOLVER.MAX_EPOCHS": 0,
        "SOLVER.STEPS_EPOCHS": (),
        "SOLVER.MAX_ITER": 2,
    }
    train_net.main(["--config-file", "mine/config.yaml", *(str(x) for pair in options.items() for x in pair)])
    output = tmp_path / "output" / "mine"
    assert (output / "model_final.pth").is_file()
    metrics = [json.loads(x) for x in (output / "metrics.json").read_text().splitlines()]
    assert any("bbox/AP" in x for x in metrics)
    assert json.loads((output / "inference" / "coco_instances_results.json").read_text())
    assert not any("no anchor suits" in x.getMessage() for x in caplog.records)
