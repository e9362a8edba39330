"""What a file is that is no checkpoint of PyTorch, and what to do about it."""

import os
import tarfile
import zipfile

__all__ = ["is_safetensors", "what_else"]

_AGAIN = "download the file again"
_UNPACK = "unpack it, and give the checkpoint that it holds"
# What a file begins with: what it is, and the mend.
_BEGINNINGS = (
    (
        b"version https://git-lfs.github.com/spec/",
        f"is a pointer of git LFS instead of its file; {_AGAIN} (git lfs pull)",
    ),
    (b"\x89HDF\r\n", "is an HDF5 file, of Keras for instance; save the weights with PyTorch"),
    (b"\x1f\x8b", f"is compressed with gzip; {_UNPACK}"),
    (b"BZh", f"is compressed with bzip2; {_UNPACK}"),
    (b"\xfd7zXZ", f"is compressed with xz; {_UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"is compressed with zstd; {_UNPACK}"),
    (b"7z\xbc\xaf", f"is a 7z archive; {_UNPACK}"),
    (b"Rar!", f"is a rar archive; {_UNPACK}"),
    (b"%PDF", "is a PDF; give the file of the weights"),
)


def is_safetensors(path: str) -> bool:
    """Whether a file begins as one of safetensors does: the length of its header, which is JSON, and this."""
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= os.path.getsize(path) - 8


def what_else(path: str) -> str:
    """What a file is and the mend, like "is an HTML page, ...; download the file again"; "" where that is not known."""
    with open(path, "rb") as file:
        head = file.read(1024)
        file.seek(-min(1, len(head)), os.SEEK_END)
        last = file.read()
    if not head:
        return f"is empty; {_AGAIN}, or copy it again"
    if zipfile.is_zipfile(path):
        return _zip(path)
    if tarfile.is_tarfile(path):
        return f"is a tar archive; {_UNPACK}"
    for beginning, answer in _BEGINNINGS:
        if head.startswith(beginning):
            return answer
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")) or b"<html" in start:
        return f"is an HTML page, as a download leaves that has failed or asks for a login; {_AGAIN}"
    # Of the format's first two fields: the version, and who wrote it (or the graph).
    if head[0] == 0x08 and head[1] < 0x20 and head[2:3] in (b"\x12", b"\x1a", b"\x3a"):
        return "is an ONNX model; give the weights that it was exported from"
    if _is_text(head) and last != b".":  # which ends a pickle, also one of letters alone
        return f"is a text file, which begins {' '.join(head.decode(errors='ignore').split())[:40]!r}; {_AGAIN}"
    return ""


def _zip(path: str) -> str:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        return "is a TorchScript program; where it was made, save the state_dict of the model with torch.save"
    if any(name.endswith("data.pkl") for name in names):
        return ""  # a checkpoint, which is damaged
    if names and all(name.endswith(".npy") for name in names):
        return "is a file of numpy's savez; save the weights as a .pth file with torch.save(state_dict)"
    return f"is a zip archive of other files ({names[0] if names else 'it is empty'}); {_UNPACK}"


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # otherwise a letter is cut in two
            return False
        text = head[: error.start].decode()
    return all(letter.isprintable() or letter.isspace() for letter in text)
