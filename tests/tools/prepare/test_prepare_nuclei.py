"""Tiling with masks, on a small wheel of the same layout as the real one; nothing is downloaded."""

import contextlib
import hashlib
import io
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from codetr_d2_programs import wheels


def nuclei() -> np.ndarray:
    """[512, 512] numbers of discs that do not touch each other; some are cut by the borders of tiles, some tiny."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:512, :512]
    numbers = np.zeros((512, 512), np.uint16)
    for i, (cy, cx) in enumerate(np.mgrid[20:512:40, 20:512:40].reshape(2, -1).T, 1):
        radius = 3 if i % 10 == 0 else rng.integers(7, 14)
        dy, dx = rng.integers(-5, 6, 2)
        numbers[(y - cy - dy) ** 2 + (x - cx - dx) ** 2 <= radius**2] = i
    return numbers


@pytest.fixture
def dataset(tool, monkeypatch, tmp_path):
    """(the script, a wheel for it): a picture whose grey level is the square of what each pixel's position gives."""
    script = tool("prepare_nuclei")
    wheel = tmp_path / "nuclei.whl"
    y, x = np.mgrid[:512, :512]
    pictures = {script.PICTURE: ((x // 4 + y // 4) ** 2).astype(np.uint16), script.MASKS: nuclei()}
    with zipfile.ZipFile(wheel, "w") as archive:
        for member, pixels in pictures.items():
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "tiff")
            archive.writestr(member, file.getvalue())
    monkeypatch.setattr(script, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return script, wheel


def test_masks_are_where_the_nuclei_are(dataset, tmp_path):
    script, wheel = dataset
    folder = tmp_path / "nuclei"
    script.prepare(folder, wheel)
    numbers = nuclei()
    areas = np.bincount(numbers.flat)
    y, x = np.mgrid[:512, :512]
    grey = np.round((x // 4 + y // 4) * (255 / 254))
    used = {}
    for split in ("train", "test"):
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(folder / f"{split}.json"))
        assert [c["name"] for c in coco.cats.values()] == ["nucleus"]
        covered = np.zeros((512, 512), bool)
        for image in coco.imgs.values():
            left, top = map(int, image["file_name"].removesuffix(".png").split("_"))
            tile = slice(top, top + 128), slice(left, left + 128)
            covered[tile] = True
            pixels = np.asarray(Image.open(folder / split / image["file_name"]))
            assert pixels.dtype == np.uint8 and np.abs(pixels - grey[tile]).max() <= 1
            inside = np.bincount(numbers[tile].flat, minlength=len(areas))
            expected = {i for i in range(1, len(areas)) if inside[i] >= 40 and inside[i] >= 0.5 * areas[i]}
            found = set()
            for annotation in coco.imgToAnns[image["id"]]:
                mask = coco.annToMask(annotation).astype(bool)
                [number] = np.unique(numbers[tile][mask])
                assert np.array_equal(mask, numbers[tile] == number) and mask.sum() == annotation["area"]
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                assert annotation["bbox"] == [columns[0], rows[0], len(columns), len(rows)]
                found.add(int(number))
            assert found == expected and len(found) > 3
        used[split] = covered
    assert not (used["train"] & used["test"]).any() and (used["train"] | used["test"]).all()


def test_second_run_needs_no_wheel(dataset, tmp_path, capsys):
    script, wheel = dataset
    script.prepare(tmp_path / "nuclei", wheel)
    wheel.unlink()
    script.prepare(tmp_path / "nuclei")
    assert "there already" in capsys.readouterr().out


def test_another_wheel(dataset, tmp_path):
    script, wheel = dataset
    with open(wheel, "ab") as file:
        file.write(b"x")
    with pytest.raises(SystemExit, match="nuclei.whl has sha256"):
        script.prepare(tmp_path / "nuclei", wheel)
    assert not (tmp_path / "nuclei").exists()


def test_one_wheel_for_all_systems(dataset, tmp_path, monkeypatch):
    """The download asks for the one wheel whose hash is known, and gets that from pip."""
    script, wheel = dataset
    commands = []

    def run(command):
        commands.append(command)
        (target := tmp_path / command[command.index("--dest") + 1] / wheel.name).write_bytes(wheel.read_bytes())
        return SimpleNamespace(returncode=0 if target.exists() else 1)

    monkeypatch.setattr(wheels, "subprocess", SimpleNamespace(run=run))
    script.prepare(tmp_path / "nuclei")
    [command] = commands
    assert command[-1] == "stardist==0.9.2" and {"--platform=manylinux_2_28_x86_64", "--abi=cp311"} < set(command)
    assert (tmp_path / "nuclei" / "train.json").is_file()
