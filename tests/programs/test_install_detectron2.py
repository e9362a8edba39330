"""The repacking of detectron2's source wheel, on a small wheel of the same layout; nothing is downloaded."""

import base64
import hashlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from codetr_d2_programs import install_detectron2

ROOT = Path(__file__).parents[2]
METADATA = """\
Metadata-Version: 2.1
Name: sal-detectron2
Version: 0.7.2
Summary: A platform for object detection
Requires-Python: >=3.8
License-File: LICENSE
Requires-Dist: Pillow>=7.1
Requires-Dist: numpy<2
Requires-Dist: omegaconf<2.4,>=2.1
Requires-Dist: dataclasses; python_version < "3.7"
Requires-Dist: black
Provides-Extra: all
Requires-Dist: fairscale; extra == "all"
"""
SOURCE_FILES = {
    "detectron2/__init__.py": '__version__ = "0.7.2"\n',
    "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "\x7fELF",
    "detectron2/engine/": "",
    "detectron2/engine/__init__.py": "NAME = 'engine'\n",
    "detectron2/model_zoo/configs/base.yaml": "VERSION: 2\n",
    "tools/__init__.py": "",
    "tools/train.py": "raise SystemExit\n",
    "sal_detectron2-0.7.2.dist-info/METADATA": METADATA,
    "sal_detectron2-0.7.2.dist-info/LICENSE": "the licence\n",
    "sal_detectron2-0.7.2.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: cp310-none-any\n",
    "sal_detectron2-0.7.2.dist-info/RECORD": "",
}


@pytest.fixture
def script():
    return install_detectron2


@pytest.fixture
def source_wheel(tmp_path):
    path = tmp_path / "sal_detectron2-0.7.2-cp310-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in SOURCE_FILES.items():
            wheel.writestr(name, text)
    return path


def install(script, source_wheel: Path, folder: Path) -> Path:
    """Repack ``source_wheel`` and let pip, the independent judge of a wheel, install it into a folder of its own."""
    wheel = script.repack(source_wheel, folder)
    site = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*command, str(wheel)], check=True)
    return site


def test_repacked_wheel_installs_only_pure_detectron2(script, source_wheel, tmp_path):
    site = install(script, source_wheel, tmp_path)
    kept = {name for name in SOURCE_FILES if name.startswith("detectron2/") and not name.endswith((".so", "/"))}
    for name in kept:
        assert (site / name).read_text() == SOURCE_FILES[name]
    assert sorted(path.name for path in site.iterdir()) == ["detectron2", "detectron2-0.7.2+py3.dist-info"]
    assert not list(site.rglob("*.so"))


def test_repacked_wheel_has_requirements_that_hold_today(script, source_wheel, tmp_path):
    site = install(script, source_wheel, tmp_path)
    (distribution,) = importlib.metadata.distributions(path=[str(site)])
    assert distribution.metadata["Name"] == "detectron2"
    assert distribution.version == "0.7.2+py3"
    expected = ["numpy", "fvcore", "iopath", "Pillow>=7.1", "omegaconf<2.4,>=2.1"]
    assert sorted(distribution.requires) == sorted(expected)
    assert distribution.metadata.get_all("Provides-Extra") is None
    assert distribution.read_text("LICENSE") == "the licence\n"


def test_record_lists_every_file_with_its_hash_and_size(script, source_wheel, tmp_path):
    with zipfile.ZipFile(script.repack(source_wheel, tmp_path)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    record = next(name for name in files if name.endswith(".dist-info/RECORD"))
    rows = [line.split(",") for line in files[record].decode().splitlines()]
    assert sorted(row[0] for row in rows) == sorted(files)
    for name, digest, size in rows:
        if name != record:
            encoded = (
                digest.removeprefix("sha256=") + "="
            )  # 32 bytes in base64 end with one "=", which wheels leave out
            assert base64.urlsafe_b64decode(encoded) == hashlib.sha256(files[name]).digest()
            assert int(size) == len(files[name])


@pytest.fixture
def main(script, monkeypatch):
    """Run the script's command line as if there were no detectron2; return the commands that it would have run."""

    def run_main(*arguments, installed=False):
        commands = []

        def run(command):
            commands.append(command)
            return subprocess.CompletedProcess(command, 0)

        monkeypatch.setattr(script.subprocess, "run", run)
        monkeypatch.setattr(script, "is_installed", lambda: installed)
        monkeypatch.setattr(sys, "argv", ["codetr_d2 install-detectron2", *map(str, arguments)])
        script.main()
        return commands

    return run_main


def test_installs_the_repacked_wheel_with_pip(main, script, source_wheel, monkeypatch):
    monkeypatch.setattr(script, "SOURCE_SHA256", hashlib.sha256(source_wheel.read_bytes()).hexdigest())
    (command,) = main("--wheel", source_wheel)
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert Path(command[-1]).name == "detectron2-0.7.2+py3-py3-none-any.whl"


def test_installed_detectron2_is_left_alone(main, source_wheel, capsys):
    assert main("--wheel", source_wheel, installed=True) == []
    assert "used as it is" in capsys.readouterr().out


def test_file_with_another_hash_is_refused(main, source_wheel):
    with pytest.raises(SystemExit, match=r"sal_detectron2-0\.7\.2-cp310-none-any\.whl has sha256 .* not 491af0c7"):
        main("--wheel", source_wheel)


def test_missing_wheel_file_is_named(main, tmp_path):
    with pytest.raises(SystemExit, match=r"absent\.whl is not a file"):
        main("--wheel", tmp_path / "absent.whl")


@pytest.mark.parametrize(
    "folder, has_metadata, expected",
    [("site", True, True), ("site", False, False), ("checkout", False, True), (None, False, False)],
    ids=["installed", "interrupted installation", "source checkout", "none"],
)
def test_what_counts_as_installed(folder, has_metadata, expected, script, tmp_path, monkeypatch):
    site = tmp_path / "site"
    if folder is not None:
        (tmp_path / folder / "detectron2").mkdir(parents=True)
        (tmp_path / folder / "detectron2" / "__init__.py").touch()
    if has_metadata:
        (site / "detectron2-0.6.dist-info").mkdir()
        (site / "detectron2-0.6.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: detectron2\n")
    monkeypatch.setattr(sys, "path", [str(site), str(tmp_path / "checkout")])
    monkeypatch.delitem(sys.modules, "detectron2", raising=False)
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(site))
    assert script.is_installed() is expected


def test_runs_before_anything_is_installed():
    """As the set-up calls it: with the standard library alone."""
    command = [sys.executable, "-I", "-S", ROOT / "tools" / "install_detectron2.py", "--help"]
    assert "--wheel WHEEL" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("has_opencv", [True, False])
def test_opencv_is_installed_where_there_is_none(main, source_wheel, monkeypatch, has_opencv):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        install_detectron2.importlib.util, "find_spec", lambda x: has_opencv or None if x == "cv2" else find_spec(x)
    )
    commands = main(installed=True)
    assert [command[-1] for command in commands] == ([] if has_opencv else ["opencv-python-headless"])
