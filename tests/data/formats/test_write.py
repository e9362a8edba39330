import json

import pytest
from PIL import Image
from pycocotools.coco import COCO

from codetr_d2.data.formats import read_export
from codetr_d2.data.formats.write import write_coco_folder
from codetr_d2.errors import InputError
from tests.data.formats import exports


@pytest.mark.parametrize("copy", [False, True])
def test_what_is_written_is_coco(copy, tmp_path):
    """pycocotools reads it, the pictures are there, and reading it as an export gives the same."""
    exports.coco(tmp_path / "source")
    export = read_export(tmp_path / "source")
    files = write_coco_folder(export, ["train", "val", "train"], tmp_path / "a" / "mine", copy)
    assert {split: len(COCO(str(file)).getAnnIds()) for split, (_, file) in files.items()} == {"train": 2, "val": 1}
    folder, file = files["train"]
    assert [x["file_name"] for x in json.loads(file.read_text())["images"]] == ["a.png", "empty.png"]
    assert Image.open(folder / "a.png").size == (64, 48)
    assert (folder / "a.png").is_symlink() != copy
    again = read_export(tmp_path / "a" / "mine")
    assert again.coco["categories"] == export.coco["categories"]
    assert [x["bbox"] for x in again.coco["annotations"]] == [x["bbox"] for x in export.coco["annotations"]]
    assert [x["split"] for x in again.coco["images"]] == ["train", "train", "val"]


def test_pictures_of_one_name_stay_apart(tmp_path):
    for part in ("one", "two"):
        exports.labelme(tmp_path / "source" / part)
    export = read_export(tmp_path / "source")
    folder, file = write_coco_folder(export, ["train"] * 6, tmp_path / "mine")["train"]
    names = [x["file_name"] for x in json.loads(file.read_text())["images"]]
    assert len(set(names)) == 6 and "one/a.png" in names and all((folder / x).is_file() for x in names)


def test_a_folder_that_is_there_stays_as_it_is(tmp_path):
    exports.coco(tmp_path)
    export = read_export(tmp_path)
    with pytest.raises(InputError, match="is there already"):
        write_coco_folder(export, ["train"] * 3, tmp_path)
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(OSError):
        write_coco_folder(export, ["train"] * 3, tmp_path / "mine", copy=True)
    assert {x.name for x in tmp_path.iterdir()} == {"annotations.json", "images"}
