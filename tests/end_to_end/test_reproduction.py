"""The paper in miniature at its smallest, K = 0 and 2: trained, measured, and written down by one command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from reproduction.results import Results

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "output" / "reproduction_short.md"


def reproduce(output: Path) -> None:
    command = [sys.executable, "-m", "reproduction", "short", "--output", str(output)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    logs = "\n".join(x.read_text()[-2000:] for x in output.rglob("*.out"))
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}\n{logs}"


def test_two_models_are_trained_measured_and_compared(tmp_path):
    reproduce(tmp_path)
    results = Results.read(PAGE.with_suffix("") / "results.json")
    plain, co = (results.of("digits", name)[0] for name in ("k0", "k2"))
    for run in (plain, co):
        assert [i for i, _ in run.ap_by_iteration] == [50, 100, 150, 200, 250]
        assert run.ap > 40 and run.ap > run.ap_by_iteration[0][1] + 30  # they have learnt the digits
        assert [i for i, _ in run.instability] == [100, 150, 200, 250]
        assert 0.5 < run.attention < 1 and set(run.discriminability) == {"backbone", "encoder"}
    assert plain.branches == plain.queries == plain.conflict == {}
    assert set(co.branches) == {"atss", "roi"} and min(co.branches.values()) > 40
    assert set(co.conflict) == {"detector", "atss", "roi"}
    for head in co.queries.values():
        assert head["positives per object"] > 1 and head["positive distance"] < head["negative distance"]

    text = PAGE.read_text()
    for k in ("K = 0: no auxiliary head", "K = 2: ATSS + Faster R-CNN"):
        assert k in text
    pictures = {line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert {f"reproduction_short/{x}.png" for x in ("ap", "attention", "queries", "stability", "cost")} <= pictures
    for picture in pictures:
        with Image.open(PAGE.parent / picture) as image:
            assert len(image.convert("L").getcolors(256)) > 10  # something is drawn
    before, after = json.loads((PAGE.with_suffix("") / "cost.json").read_text())
    assert (
        before["at inference (M)"] == after["at inference (M)"] and before["parameters (M)"] < after["parameters (M)"]
    )

    times = {x: x.stat().st_mtime_ns for x in tmp_path.rglob("model_final.pth")}
    reproduce(tmp_path)  # only the page is made anew
    assert len(times) == 2 and all(x.stat().st_mtime_ns == time for x, time in times.items())
