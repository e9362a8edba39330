from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codetr_d2.errors import InputError
from codetr_d2.inference import MediaFile, find_media, name_drawings


def save(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, "PNG")


def test_a_file_is_what_it_holds(tmp_path):
    save(tmp_path / "picture", tmp_path / "picture.txt", tmp_path / "picture.mp4")
    for name in ("code.ts", "readme.txt", "list.m3u8"):
        (tmp_path / name).write_text("export const x = 1;\n" * 100)
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.4\n" + bytes(range(256)))
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "data.bin").write_bytes(np.random.default_rng(0).bytes(10000))
    (tmp_path / "damaged.JPG").write_text("an error page")
    (tmp_path / "damaged.mp4").write_bytes(b"\0\0\0\x1cftypisom")
    files, left_out = find_media([tmp_path], tmp_path / "out")
    kinds = {x.path.name: x.is_video for x in files}
    assert kinds == {"picture": 0, "picture.txt": 0, "picture.mp4": 0, "damaged.JPG": 0, "damaged.mp4": 1}
    assert len(left_out) == 6
    with pytest.raises(InputError, match="paper.pdf is not an image that can be read, and not a video"):
        find_media([tmp_path / "picture", tmp_path / "paper.pdf"], tmp_path / "out")


def test_each_file_once_and_without_the_output(tmp_path):
    save(tmp_path / "a" / "x.png", tmp_path / "a" / "out" / "x.png", tmp_path / "a" / "b" / "y.png")
    (tmp_path / "a" / "b" / "back").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "elsewhere").symlink_to(tmp_path / "c")
    save(tmp_path / "c" / "z.png")
    files, left_out = find_media([tmp_path / "a" / "x.png", tmp_path / "a"], tmp_path / "a" / "out")
    found = [str(x.path.relative_to(tmp_path)) for x in files]
    assert sorted(found) == ["a/b/y.png", "a/elsewhere/z.png", "a/x.png"] and not left_out


def test_drawings_mirror_the_folder_and_never_meet(tmp_path):
    names = ["x.png", "x.jpg", "X.JPG", "sub/x.jpg", "sub/x.jpg", "sub/x.png.jpg", "clip.ts", "noise"]
    files = [MediaFile(tmp_path / str(i), name.endswith("ts"), Path(name)) for i, name in enumerate(names)]
    drawings = [str(x.relative_to(tmp_path / "out")) for x in name_drawings(files, tmp_path / "out")]
    assert drawings == [
        *("x.png", "x.jpg.png", "X.JPG-2.png", "sub/x.png", "sub/x.jpg.png", "sub/x.png.png", "clip.mp4", "noise.png")
    ]


def test_inputs_are_not_overwritten(tmp_path):
    save(tmp_path / "a" / "x.png")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    files, _ = find_media([tmp_path / "a"], tmp_path / "link")
    with pytest.raises(InputError, match="x.png would be overwritten"):
        name_drawings(files, tmp_path / "link")
