"""Fonts that have the letters of a text."""

import functools
import logging
import unicodedata
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

__all__ = ["load_font"]

logger = logging.getLogger(__name__)

_DEFAULT_FAMILY = "DejaVu Sans"  # comes with matplotlib; has Latin, Greek, Cyrillic, Arabic, and many more letters
_CJK = ("CJK", "HANGUL", "HIRAGANA", "KATAKANA", "BOPOMOFO")


def load_font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """A font with every letter of a text: DejaVu Sans where it has them, else one of the system's.

    Where no font has them all, it is DejaVu Sans, which draws squares in place of the others, and one line of the log
    names the text and a font to install.

    Args:
        text: without its blanks, what must be in the font.
        size: in pixels.
    """
    return _open(_find(text), size)


@functools.lru_cache(maxsize=64)
def _open(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


@functools.cache
def _find(text: str) -> str:
    # Marks of direction and the like (Cf) have no shape of their own.
    letters = np.array([ord(x) for x in set(text) if not x.isspace() and unicodedata.category(x) != "Cf"], np.uint32)
    default = font_manager.findfont(_DEFAULT_FAMILY)
    for file in (default, *_system_fonts()):
        if np.isin(letters, _letters_of(file)).all():
            try:
                _open(file, 16)
                return file
            except OSError:  # pictures of letters in one size, as some fonts of emoji are
                pass
    missing = "".join(map(chr, sorted(set(letters.tolist()) - set(_letters_of(default).tolist()))))
    is_cjk = any(unicodedata.name(x, "").startswith(_CJK) for x in missing)
    logger.warning(
        "The class %r is drawn with squares: no font here has its letters (%s). Install one, for instance %s",
        text,
        missing,
        "Noto Sans CJK (the package fonts-noto-cjk of Debian and Ubuntu)" if is_cjk else "the Noto font of its script",
    )
    return default


@functools.cache
def _system_fonts() -> list[str]:
    """Files of the system's fonts, upright ones without serifs first."""
    # macOS's LastResort has a box for every letter.
    files = [x for x in font_manager.findSystemFonts() if not Path(x).name.startswith("LastResort")]
    return sorted(files, key=lambda x: ("regular" not in x.lower(), "sans" not in x.lower(), x))


@functools.cache
def _letters_of(file: str) -> np.ndarray:
    """The code points that a font has."""
    try:
        return np.fromiter(FT2Font(file).get_charmap(), np.uint32)
    except (OSError, RuntimeError):  # a kind of font that matplotlib cannot read
        return np.empty(0, np.uint32)
