"""Reading pictures of any kind, with an error that names the file when one cannot be read."""

import io
import os
import struct
import zlib
from typing import BinaryIO

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..errors import InputError

__all__ = ["NO_PICTURES", "check_image_file", "image_size", "is_image_file", "read_image"]

# Formats whose headers Pillow reads and whose pictures it doesn't: videos, scientific data, drawings.
NO_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")

# What Pillow raises on damaged files, depending on the format and on where the damage is.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)
# Pillow keeps values of more than 8 bits in these modes, and clips them when it is asked for 8 bits.
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_EXIF_ORIENTATION = 0x0112
# Pillow's own exif_transpose also writes the EXIF block anew, which fails on malformed ones.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TAIL_BYTES = 4096
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_DESCRIPTIONS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def _open(file_name: str, file: BinaryIO) -> Image.Image:
    """Open ``file`` as a picture without decoding its pixels."""
    try:
        return Image.open(file)
    except Image.DecompressionBombError as error:
        raise InputError(f"{file_name} is too large to be read as one image ({error}). Cut it into tiles.") from error
    except _DAMAGE as error:
        raise InputError(
            f"{file_name} is not an image that can be read ({error or type(error).__name__}). "
            "Replace the file, or remove it from the dataset."
        ) from error


def _without_descriptions(file: BinaryIO) -> BinaryIO | None:
    """A PNG file without its texts and its colour profile, None where it is no PNG file or has neither.

    Pillow refuses sound pictures whose texts or profile are larger than it expects.
    """
    file.seek(0)
    if file.read(len(_PNG_SIGNATURE)) != _PNG_SIGNATURE:
        return None
    content = memoryview(_PNG_SIGNATURE + file.read())
    kept, place = [content[: len(_PNG_SIGNATURE)]], len(_PNG_SIGNATURE)
    while place < len(content):  # a chunk: its length, its kind, so many bytes, a checksum
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        if content[place + 4 : place + 8] not in _PNG_DESCRIPTIONS:
            kept.append(content[place:end])
        place = end
    bare = b"".join(kept)
    return io.BytesIO(bare) if len(bare) < len(content) else None


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # the EXIF block of many a camera is malformed; the picture itself is fine
        return 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) in pixels once the EXIF orientation is applied."""
    return image.size[::-1] if _orientation(image) in (5, 6, 7, 8) else image.size


def _check_size(file_name: str, image: Image.Image, size: tuple[int, int]) -> None:
    if size not in (_upright_size(image), image.size):
        raise InputError(
            f"{file_name} is {_upright_size(image)[0]} x {_upright_size(image)[1]} pixels, but its annotation says "
            f"{size[0]} x {size[1]}. Correct width and height (and the boxes) in the annotation file, or put back the "
            "image that was annotated."
        )


def _to_8_bit(image: Image.Image) -> Image.Image:
    """A single-channel picture of more than 8 bits -> an 8-bit one of the same brightness.

    Cameras and microscopes store 10, 12 or 14 bits in 16-bit files, so full scale is taken to be the smallest of the
    usual bit depths that holds the brightest pixel: dark 12-bit pictures don't turn black.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    brightest = values.max(initial=0)
    depths = [255, 1023, 4095, 16383, 65535, brightest]
    if image.mode == "F":
        depths.insert(0, 1)
    full_scale = next(x for x in depths if x >= brightest) or 1
    return Image.fromarray((values.clip(0) * (255 / full_scale)).round().astype(np.uint8))


def read_image(file_name: str | os.PathLike, format: str = "BGR", size: tuple[int, int] | None = None) -> np.ndarray:
    """Read an image file of any kind that Pillow knows as 8-bit colours, upright.

    Greyscale, palette, CMYK, transparent and 16-bit pictures are converted. The EXIF orientation is applied as
    viewers and annotation tools do, unless ``size`` shows that the annotations were made on the picture as stored.

    Args:
        file_name: path of the image.
        format: as in :func:`detectron2.data.detection_utils.read_image`: "RGB", "BGR", "L", ...
        size: (width, height) in pixels that the annotations claim, or None.

    Returns:
        [H, W, C] uint8 array, contiguous and writable.

    Raises:
        InputError: the file is missing or damaged, or its size is not ``size``.
    """
    file_name = os.fspath(file_name)
    try:
        file = PathManager.open(file_name, "rb")
    except OSError as error:
        raise InputError(f"{file_name} cannot be opened ({error.strerror or error}). Check the path.") from error
    with file:
        try:
            return _read(file_name, file, format, size)
        except InputError as error:
            bare = _without_descriptions(file) if error.__cause__ else None
            if bare is None:
                raise
        return _read(file_name, bare, format, size)


def _read(file_name: str, file: BinaryIO, format: str, size: tuple[int, int] | None) -> np.ndarray:
    image = _open(file_name, file)
    try:
        image.load()  # first: asked for its EXIF block, Pillow decodes a PNG too, and no error comes a second time
    except _DAMAGE as error:
        raise _damaged(file_name, error) from error
    upright = True
    if size is not None:
        _check_size(file_name, image, size)
        upright = size == _upright_size(image)
    try:
        if upright and _orientation(image) in _UPRIGHT:
            image = image.transpose(_UPRIGHT[_orientation(image)])
        if image.mode in _DEEP_MODES:
            image = _to_8_bit(image)
        elif image.mode in ("P", "PA"):
            image = image.convert("RGBA")  # Pillow warns about some transparent palettes otherwise
        return np.require(convert_PIL_to_numpy(image, format), requirements=["C", "W"])
    except _DAMAGE as error:
        raise _damaged(file_name, error) from error


def _damaged(file_name: str, error: Exception) -> InputError:
    return InputError(
        f"{file_name} is truncated or damaged ({error or type(error).__name__}). "
        "Replace the file, or remove it from the dataset."
    )


def check_image_file(file_name: str | os.PathLike, size: tuple[int, int] | None = None) -> None:
    """Check before training that an image can be read, mostly without decoding it.

    The header is read, and the end of the file must hold the mark that ends a whole JPEG or PNG file; a file without it
    (truncated, another format, or with data appended) is decoded. Damage in the middle is found when it is read.

    Args:
        file_name: path of the image.
        size: (width, height) in pixels that the annotations claim, or None.

    Raises:
        InputError: as :func:`read_image`.
    """
    file_name = os.fspath(file_name)
    end_marks = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
    try:
        with PathManager.open(file_name, "rb") as file:
            try:
                image = _open(file_name, file)
            except InputError:
                whole = False  # the whole file is looked at below
            else:
                if size is not None:
                    _check_size(file_name, image, size)
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - _TAIL_BYTES))
                whole = image.format in end_marks and end_marks[image.format] in file.read()
    except OSError as error:
        raise InputError(f"{file_name} cannot be opened ({error.strerror or error}). Check the path.") from error
    if not whole:
        read_image(file_name, size=size)


def image_size(file_name: str | os.PathLike) -> tuple[int, int]:
    """(width, height) in pixels of a picture as it looks, with its EXIF orientation applied; only its header is read.

    Raises:
        InputError: as :func:`read_image`.
    """
    file_name = os.fspath(file_name)
    try:
        with PathManager.open(file_name, "rb") as file:
            return _upright_size(_open(file_name, file))
    except OSError as error:
        raise InputError(f"{file_name} cannot be opened ({error.strerror or error}). Check the path.") from error


def is_image_file(file_name: str | os.PathLike) -> bool:
    """Whether a file is a picture by what it holds, whatever its name; damage after its header is not looked for."""
    file_name = os.fspath(file_name)
    try:
        with PathManager.open(file_name, "rb") as file:
            try:
                image = _open(file_name, file)
            except InputError:
                if (bare := _without_descriptions(file)) is None:
                    return False
                image = _open(file_name, bare)
    except (OSError, InputError):
        return False
    return image.format not in NO_PICTURES
