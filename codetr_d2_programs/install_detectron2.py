"""Install detectron2 into the running Python, unless it is importable already.

detectron2 publishes no package under its own name, and a build from its git repository needs access to that
repository. ``sal-detectron2`` carries detectron2's Python (upstream as of April 2024) in a wheel that is
tagged for CPython 3.10 although its Python is pure. This script downloads that one file, checks its hash and repacks
it: without the compiled ``_C`` (which only CPython 3.10 could load, and for which torchvision stands in), without the
stray top-level ``tools`` package, under detectron2's own name, for any Python 3, with the requirements that hold today.

An installed detectron2, of whatever build, is used as it is and never replaced. Nor is an OpenCV, which it needs; where
there is none, it is opencv-python-headless.

    codetr_d2 install-detectron2 [--wheel FILE]     # --wheel: the downloaded file, for machines without network

In the project's folder "python tools/install_detectron2.py" does the same before anything is installed.
"""

import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

SOURCE = "sal-detectron2==0.7.2"
SOURCE_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
VERSION = "0.7.2+py3"
DIST_INFO = f"detectron2-{VERSION}.dist-info"
DROPPED_REQUIREMENTS = {"numpy", "black", "dataclasses"}
ADDED_REQUIREMENTS = ["numpy", "fvcore", "iopath"]
WHEEL_TEXT = """\
Wheel-Version: 1.0
Generator: codetr_d2 install-detectron2
Root-Is-Purelib: true
Tag: py3-none-any
"""


def is_installed() -> bool:
    """Whether this Python can import a detectron2, of whatever build."""
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:
        return False
    # Among the installed packages but without metadata, it is what an interrupted installation left behind.
    if Path(spec.origin).is_relative_to(sysconfig.get_path("purelib")):
        return any(importlib.metadata.distributions(name="detectron2"))
    return True


def download(folder: Path) -> Path:
    """Download the source wheel into ``folder`` with pip and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.10", "--dest", str(folder), SOURCE]
    if subprocess.run(command).returncode != 0:
        sys.exit(
            f"error: could not download {SOURCE}. Check the network and run this script again, give the file with "
            "--wheel FILE, or install detectron2 from its repository as its INSTALL.md says and run again."
        )
    return next(folder.glob("sal_detectron2-*.whl"))


def rewrite_metadata(text: str) -> str:
    """METADATA of the source wheel -> METADATA of ours: own name and version, requirements that hold today."""
    lines = []
    for line in text.splitlines():
        requirement = re.match(r"Requires-Dist: ([\w.-]+)", line)
        if line.startswith("Name: "):
            line = "Name: detectron2"
        elif line.startswith("Version: "):
            line = f"Version: {VERSION}"
        elif line.startswith("Provides-Extra") or (requirement and "extra ==" in line):
            continue
        elif requirement and requirement[1].lower() in DROPPED_REQUIREMENTS:
            continue
        lines.append(line)
    first = next(i for i, line in enumerate(lines) if line.startswith("Requires-Dist"))
    lines[first:first] = [f"Requires-Dist: {name}" for name in ADDED_REQUIREMENTS]
    return "\n".join(lines) + "\n"


def repack(source: Path, folder: Path) -> Path:
    """Write the pure-Python wheel made from ``source`` into ``folder`` and return its path."""
    target = folder / f"detectron2-{VERSION}-py3-none-any.whl"
    records = []
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:

        def add(name: str, data: bytes) -> None:
            new.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            records.append(f"{name},sha256={digest},{len(data)}")

        for name in old.namelist():
            if name.startswith("detectron2/") and not name.endswith((".so", "/")):
                add(name, old.read(name))
            elif name.endswith(".dist-info/METADATA"):
                add(f"{DIST_INFO}/METADATA", rewrite_metadata(old.read(name).decode()).encode())
            elif name.endswith(".dist-info/LICENSE"):
                add(f"{DIST_INFO}/LICENSE", old.read(name))
        add(f"{DIST_INFO}/WHEEL", WHEEL_TEXT.encode())
        add(f"{DIST_INFO}/top_level.txt", b"detectron2\n")
        records.append(f"{DIST_INFO}/RECORD,,")
        new.writestr(f"{DIST_INFO}/RECORD", "\n".join(records) + "\n")
    return target


def install(what: str, name: str) -> None:
    """Install a file or a requirement with pip."""
    if subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", what]).returncode != 0:
        sys.exit(f"error: pip could not install {name}; its lines above say why. Mend that and run this again.")
    print(f"Installed {name}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {SOURCE}, already downloaded")
    args = parser.parse_args()
    if importlib.util.find_spec("cv2") is None:
        install("opencv-python-headless", "OpenCV")
    if is_installed():
        print("detectron2 is installed already and is used as it is.")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.wheel is not None and not args.wheel.is_file():
            sys.exit(f"error: {args.wheel} is not a file. Give the downloaded wheel of {SOURCE} with --wheel FILE.")
        source = args.wheel or download(folder)
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        if digest != SOURCE_SHA256:
            sys.exit(
                f"error: {source.name} has sha256 {digest}, not {SOURCE_SHA256}: it is another or a damaged file. "
                f"Delete it and run this script again, or download {SOURCE} anew."
            )
        install(str(repack(source, folder)), f"detectron2 {VERSION}")
