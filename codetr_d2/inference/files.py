"""Pictures and videos: finding them by what they hold, and naming what is drawn of them."""

import mimetypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
from PIL import Image

from ..data.images import NO_PICTURES, is_image_file
from ..errors import InputError

__all__ = ["MediaFile", "find_media", "name_drawings"]


class MediaFile(NamedTuple):
    """A picture or a video.

    Attributes:
        path: the file.
        is_video: whether it is a video.
        name: its path in the folder that was asked for, or its mere name where it was asked for itself.
    """

    path: Path
    is_video: bool
    name: Path


def find_media(inputs: Sequence[Path], output: Path) -> tuple[list[MediaFile], list[Path]]:
    """The pictures and videos that the inputs name: files, and folders with all that is in them.

    What a file is decides its content; a suffix does where nothing can be made of it, so that whoever reads a damaged
    picture says so. Hidden files and folders, and the folder ``output`` in another one, are left out.

    Returns:
        The files, each once, and those of the folders that were left out: hidden ones, and what is no picture and no
        video.

    Raises:
        InputError: an input does not exist or is something else, or a folder holds no picture and no video.
    """
    found: dict[Path, MediaFile] = {}
    left_out: list[Path] = []
    for path in inputs:
        if path.is_dir():
            number = 0
            for file in _walk(path, output):
                kind = None if file.name.startswith(".") else _kind(file)
                if kind is None:
                    left_out.append(file)
                else:
                    found.setdefault(file, MediaFile(file, kind == "video", file.relative_to(path)))
                    number += 1
            if not number:
                raise InputError(f"The folder {path} holds no picture and no video. Name another one.")
        elif path.is_file():
            kind = _kind(path)
            if kind is None:
                raise InputError(f"{path} is not an image that can be read, and not a video. Name another file.")
            found.setdefault(path, MediaFile(path, kind == "video", Path(path.name)))
        else:
            raise InputError(f"{path} does not exist. Name a picture, a folder of pictures, or a video.")
    return list(found.values()), left_out


def _walk(folder: Path, output: Path) -> Iterator[Path]:
    """All files below a folder, each real folder once: links may lead back."""

    def refuse(error: OSError) -> None:
        raise InputError(f"The folder {error.filename} cannot be read ({error.strerror}). Mend its permissions.")

    seen = {os.path.realpath(folder), os.path.realpath(output)}
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        kept = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(place, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        yield from (Path(place, name) for name in sorted(files))


def _kind(file: Path) -> str | None:
    """ "picture", "video", or None for anything else."""
    if is_image_file(file):
        return "picture"
    is_text = _is_text(file)
    if not is_text and _opens_as_video(file):
        return "video"
    suffix = file.suffix.lower()
    if suffix != ".ts" and (mimetypes.guess_type(file.name)[0] or "").startswith("video/"):  # .ts is TypeScript too
        return "video"
    is_picture = Image.registered_extensions().get(suffix) in Image.OPEN.keys() - set(NO_PICTURES)
    return "picture" if is_picture else None


def _is_text(file: Path) -> bool:
    """Whether a file begins as text does: FFmpeg would take it for the pictures of a terminal."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(4096)
    except OSError:
        return False
    return not set(head) & {*range(32), 127} - set(b"\t\n\r\f\x1b")


def _opens_as_video(file: Path) -> bool:
    if not file.is_file():  # a pipe would be waited for
        return False
    video = cv2.VideoCapture(str(file))
    try:
        return video.isOpened() and video.read()[0]
    finally:
        video.release()


def name_drawings(files: Sequence[MediaFile], folder: Path) -> list[Path]:
    """Where the drawing of each file goes: its name below ``folder`` as .png or .mp4, made longer where two would meet.

    Raises:
        InputError: one of the files would be overwritten.
    """
    drawings: list[Path] = []
    taken: set[str] = set()  # names that differ in case alone are one file to some systems
    for _, is_video, name in files:
        suffix, number = ".mp4" if is_video else ".png", 1
        drawing = folder / name.with_name(f"{name.stem}{suffix}")
        while str(drawing).casefold() in taken:
            drawing = folder / name.with_name(f"{name.name}{'' if number == 1 else f'-{number}'}{suffix}")
            number += 1
        taken.add(str(drawing).casefold())
        drawings.append(drawing)
    overwritten = {x.path.resolve() for x in files} & {x.resolve() for x in drawings}
    if overwritten:
        raise InputError(f"{min(overwritten)} would be overwritten. Name another folder with --output.")
    return drawings
