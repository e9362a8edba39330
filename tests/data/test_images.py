import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from codetr_d2.data import check_image_file, is_image_file, read_image
from codetr_d2.errors import InputError

EXIF_ORIENTATION = 0x0112


@pytest.fixture
def picture():
    """[32, 64, 3] RGB: four flat patches of different colours, which survive JPEG."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :32], pixels[:16, 32:] = (200, 30, 40), (20, 180, 60)
    pixels[16:, :32], pixels[16:, 32:] = (40, 50, 210), (230, 220, 210)
    return pixels


def save(pixels, path, mode=None, **kwargs):
    image = Image.fromarray(pixels)
    if mode == "P":
        image = image.quantize(16)
    elif mode:
        image = image.convert(mode)
    image.save(path, **kwargs)
    return path


@pytest.mark.parametrize(
    "mode, suffix, tolerance",
    [
        ("RGB", "png", 0),
        ("RGB", "bmp", 0),
        ("RGB", "tif", 0),
        ("RGB", "webp", 6),
        ("RGB", "jpg", 6),
        ("P", "png", 0),
        ("P", "gif", 0),
        ("RGBA", "png", 0),
        ("CMYK", "jpg", 6),
        ("CMYK", "tif", 2),
        ("YCbCr", "jpg", 6),
    ],
)
def test_colour_pictures(picture, tmp_path, mode, suffix, tolerance):
    path = save(picture, tmp_path / f"x.{suffix}", mode)
    image = read_image(path, "RGB")
    assert image.shape == picture.shape and image.dtype == np.uint8 and image.flags.c_contiguous
    # the middles of the patches: lossy formats blur their borders
    for rows in (slice(4, 12), slice(20, 28)):
        for columns in (slice(8, 24), slice(40, 56)):
            assert np.abs(image[rows, columns].astype(int) - picture[rows, columns]).max() <= tolerance
    np.testing.assert_array_equal(read_image(path, "BGR"), image[:, :, ::-1])
    check_image_file(path, (64, 32))


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_greyscale_pictures(picture, tmp_path, mode):
    path = save(picture, tmp_path / "x.png", mode)
    image = read_image(path, "RGB")
    expected = np.asarray(Image.fromarray(picture).convert(mode).convert("L"))
    np.testing.assert_array_equal(image, np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_deep_greyscale_pictures_keep_their_brightness(tmp_path, suffix, bits):
    """A ramp over the whole range of a bit depth becomes the ramp from 0 to 255."""
    ramp = np.linspace(0, 2**bits - 1, 400).round().astype(np.uint16).reshape(20, 20)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(ramp).save(path)
    image = read_image(path, "RGB").astype(int)
    np.testing.assert_allclose(image[..., 0], ramp / (2**bits - 1) * 255, atol=0.51)
    assert (image == image[..., :1]).all()


@pytest.mark.parametrize("brightest", [1.0, 255.0, 1e6])
def test_float_pictures(tmp_path, brightest):
    ramp = np.linspace(0, brightest, 400, dtype=np.float32).reshape(20, 20)
    ramp[0, 0] = np.nan
    Image.fromarray(ramp).save(tmp_path / "x.tif")
    image = read_image(tmp_path / "x.tif", "RGB")[..., 0].ravel()[1:]
    np.testing.assert_allclose(image, np.linspace(0, 255, 400)[1:], atol=0.51)


# What each EXIF orientation means for the stored pixels, so that the picture is seen as `picture`.
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(picture, tmp_path, orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    stored = np.ascontiguousarray(STORED[orientation](picture))
    path = save(stored, tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(read_image(path, "RGB"), picture)
    np.testing.assert_array_equal(read_image(path, "RGB", size=(64, 32)), picture)
    if orientation >= 5:
        # The annotation gives the size as stored, so its boxes are those of the stored picture.
        np.testing.assert_array_equal(read_image(path, "RGB", size=(32, 64)), stored)
    check_image_file(path, (64, 32))


@pytest.mark.parametrize("orientation", [1, 6])
def test_another_size_than_annotated(picture, tmp_path, orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    path = save(np.ascontiguousarray(STORED[orientation](picture)), tmp_path / "x.png", exif=exif)
    for read in (lambda: read_image(path, size=(65, 32)), lambda: check_image_file(path, (65, 32))):
        with pytest.raises(InputError, match="x.png is 64 x 32 pixels.*65 x 32"):
            read()


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "gif", "webp"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_truncated_files(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(noise, tmp_path / f"x.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    for read in (read_image, check_image_file):
        with pytest.raises(InputError, match=rf"x.{suffix} .*(truncated|not an image)"):
            read(path)


@pytest.mark.parametrize("size", [None, (64, 64)])
def test_damaged_in_the_middle(size, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(noise, tmp_path / "x.png")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(InputError, match="x.png is truncated or damaged"):
        read_image(path, size=size)


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "x.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    for name, message in (("x", "not an image"), ("nowhere", "cannot be opened"), ("folder", "cannot be opened")):
        for read in (read_image, check_image_file):
            with pytest.raises(InputError, match=f"{name}.png.*{message}"):
                read(tmp_path / f"{name}.png")


def test_huge_pictures_are_refused_by_name(picture, tmp_path, monkeypatch):
    path = save(picture, tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for read in (read_image, check_image_file):
        with pytest.raises(InputError, match="x.png is too large"):
            read(path)


def test_bytes_after_the_end_of_a_file(picture, tmp_path):
    path = save(picture, tmp_path / "x.jpg")
    path.write_bytes(path.read_bytes() + bytes(10000))
    check_image_file(path, (64, 32))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("place", ["before the pixels", "after them"])
@pytest.mark.parametrize(
    "kind, content",
    [
        (b"zTXt", b"note\0\0" + zlib.compress(b"x" * (3 << 20))),
        (b"iTXt", b"note\0\1\0\0\0" + zlib.compress(b"x" * (3 << 20))),
        (b"tEXt", b"note\0" + b"x" * (65 << 20)),
        (b"iCCP", b"profile\0\0" + zlib.compress(bytes(3 << 20))),
    ],
)
def test_large_descriptions_in_sound_png_files(picture, tmp_path, kind, content, place):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    path = save(np.ascontiguousarray(STORED[6](picture)), tmp_path / "x.png", exif=exif)
    data = path.read_bytes()
    # A chunk begins four bytes before its name; the header's has 13 bytes and a checksum.
    at = data.index(b"IHDR") + 4 + 13 + 4 if place == "before the pixels" else data.index(b"IEND") - 4
    path.write_bytes(data[:at] + chunk(kind, content) + data[at:])
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    check_image_file(path, (64, 32))
    assert is_image_file(path)
    np.testing.assert_array_equal(read_image(path, "RGB", (64, 32)), picture)
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
    if place == "before the pixels":
        path.write_bytes(path.read_bytes()[:-100])
        for read in (read_image, check_image_file):
            with pytest.raises(InputError, match="x.png is truncated"):
                read(path)


def test_what_a_picture_is(picture, tmp_path):
    for suffix in ("png", "jpg", "tif", "bmp", "gif", "webp"):
        path = save(picture, tmp_path / f"x.{suffix}")
        assert is_image_file(path.rename(tmp_path / f"{suffix} without its suffix"))
    # An MPEG video, PostScript and scientific data, whose headers Pillow knows.
    heads = [b"\0\0\1\xb3\x08\x00\x60", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"]
    heads += [b"\x89HDF\r\n\x1a\n", b"%PDF-1.4\n", b"text", b""]
    for head in heads:
        (tmp_path / "x.png").write_bytes(head + bytes(100) * (len(head) > 4))
        assert not is_image_file(tmp_path / "x.png"), head
    assert not is_image_file(tmp_path) and not is_image_file(tmp_path / "nowhere.png")
