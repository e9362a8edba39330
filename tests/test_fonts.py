import logging

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from codetr_d2 import fonts

CAT = "\u732b\u54aa"  # two Chinese letters


def write_font(path, letters: str) -> str:
    """A font with one square for each letter."""
    names = [".notdef", *(f"u{ord(x)}" for x in letters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(x): f"u{ord(x)}" for x in letters})
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(point)
    pen.closePath()
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


@pytest.fixture
def system_fonts(monkeypatch):
    """The files that the system seems to have, to be filled."""
    files = []
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: files)
    for cached in (fonts._find, fonts._system_fonts):
        cached.cache_clear()
    yield files
    for cached in (fonts._find, fonts._system_fonts):
        cached.cache_clear()


@pytest.mark.parametrize(
    "text",
    ["cat", "$1", "\u043a\u043e\u0448\u043a\u0430", "\u0642\u0637\u0629", "\u03b3\u03ac\u03c4\u03b1 1", "a\u200bb"],
)
def test_the_font_of_matplotlib_where_it_has_the_letters(system_fonts, text, caplog):
    assert fonts.load_font(text, 12).path == font_manager.findfont("DejaVu Sans")
    assert not caplog.records


def test_a_font_of_the_system_that_has_all_letters(system_fonts, tmp_path, caplog):
    (tmp_path / "damaged-sans-regular.ttf").write_bytes(b"no font")
    system_fonts += [str(tmp_path / "damaged-sans-regular.ttf"), write_font(tmp_path / "half-sans-regular.ttf", CAT[0])]
    system_fonts += [
        write_font(tmp_path / "whole-serif-bold.ttf", CAT + "1"),
        write_font(tmp_path / "whole-sans-regular.ttf", CAT + "1"),
    ]
    system_fonts.append(write_font(tmp_path / "LastResort.otf", CAT + "1"))
    font = fonts.load_font(f"{CAT} 1", 20)
    assert font.path == str(tmp_path / "whole-sans-regular.ttf") and font.size == 20
    assert font.getbbox(CAT) == (0, 0, 40, 16)  # two squares of four fifths, each as wide as the font is high
    assert not caplog.records


@pytest.mark.parametrize(
    "text, font", [(CAT, "Noto Sans CJK"), ("\uace0\uc591\uc774", "Noto Sans CJK"), ("\u0e41\u0e21\u0e27", "Noto font")]
)
def test_letters_that_no_font_has_are_said_once(system_fonts, text, font, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert fonts.load_font(text, 12).path == font_manager.findfont("DejaVu Sans")
    (record,) = caplog.records
    assert text in record.getMessage() and font in record.getMessage()
