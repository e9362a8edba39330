import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from codetr_d2.data.formats import Export, Problem
from codetr_d2.report.dataset_page import summarize, write_dataset_page

NAME = 'cat <b> & "dog"'


@pytest.fixture
def dataset(tmp_path):
    """Three pictures: two cats in the first, one in the second, none in the third; nothing is a bird."""
    images = []
    for i, (width, height) in enumerate(((100, 50), (64, 64), (40, 80)), 1):
        Image.fromarray(np.full((height, width, 3), 50 * i, np.uint8)).save(tmp_path / f"{i}.png")
        images.append({"id": i, "file_name": str(tmp_path / f"{i}.png"), "width": width, "height": height})
    boxes = [(1, [0, 0, 10, 40]), (1, [-5, 10, 16, 16]), (2, [2, 2, 32, 32]), (2, [5, 5, 0, 3])]
    annotations = [{"image_id": i, "category_id": 1, "bbox": box, "iscrowd": 0} for i, box in boxes]
    coco = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": NAME}, {"id": 2, "name": "bird"}],
    }
    export = Export("COCO", coco)
    problems = [
        Problem("box that sticks out of its picture", "cat", 1, [-5, 10, 16, 16]),
        Problem("missing picture", "</script><script>alert(1)</script>"),
        Problem("picture of two splits", "2.png of val", 2, other_image_id=1),
        Problem("picture of two splits", "3.png of val", 3, other_image_id=1),
    ]
    splits = ["train", "val", "val"]
    return export, splits, summarize("mine", export, splits, problems)


def test_counts(dataset):
    """By hand; the box without area counts as an object, and has no size."""
    _, _, summary = dataset
    assert summary.splits == ["train", "val"]
    assert summary.totals == [("pictures", [1, 2]), ("pictures without an object", [0, 1]), ("objects", [2, 2])]
    assert summary.classes == [(NAME, [2, 2], 2), ("bird", [0, 0], 0)]
    assert list(summary.problems) == ["picture of two splits", "box that sticks out of its picture", "missing picture"]
    assert sorted(summary.shown) == [0, 1, 2]
    found = {x.title.partition(":")[0]: dict(zip(x.labels, x.counts)) for x in summary.histograms}
    # roots of the areas: 20, 16 and 32 pixels, of pictures with the roots 70.7 and 64
    assert found["Size of objects"] == {"16 to 32": 2, "32 to 64": 1}
    assert found["Size of objects in percent of their picture's, sides"] == {"16 to 32%": 2, "32 to 64%": 1}
    assert {k: v for k, v in found["Aspect ratio of objects"].items() if v} == {"below 0.42": 1, "0.84 to 1.19": 2}
    assert found["Objects in a picture"] == {"0": 1, "1": 0, "2": 2}
    assert found["Size of pictures"] == {"32 to 64": 2, "64 to 128": 1}
    assert {k for k, v in found["Aspect ratio of pictures"].items() if v} == {
        "1.68 to 2.38",
        "0.84 to 1.19",
        "0.42 to 0.59",
    }
    assert summary.histograms[0].note == "from 16 to 32, median 20"


def test_both_splits_are_shown(tmp_path):
    """Of 300 pictures to train on and 20 others, all of one class, and 30 without an object."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 9, "height": 2000} for i in range(350)]
    annotations = [{"image_id": i, "category_id": 1, "bbox": [0, 0, 9, 1500], "iscrowd": 0} for i in range(320)]
    export = Export("CSV", {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]})
    splits = ["train"] * 300 + ["val"] * 20 + ["train"] * 30
    summary = summarize("mine", export, splits, [])
    shown = [(splits[i], i < 320) for i in summary.shown]
    assert len(shown) == len(set(summary.shown)) == 60
    assert shown.count(("val", True)) == 20 and shown.count(("train", False)) >= 4
    assert max(i for i in summary.shown if i < 300) > 280
    assert summary.histograms[4].note == "from 9 to 9, median 9" and summary.histograms[0].note.startswith("from 116 ")
    write_dataset_page(tmp_path / "dataset.html", summary, export, splits)
    text = (tmp_path / "dataset.html").read_text()
    assert "A dataset of 1 class, read as CSV" in text and ", chosen from 350" in text


def test_nothing_but_pictures(dataset, tmp_path):
    export, splits, _ = dataset
    export.coco["annotations"] = []
    summary = summarize("mine", export, splits, [])
    assert summary.histograms[0].counts == [] and summary.histograms[0].note == "none"
    write_dataset_page(tmp_path / "dataset.html", summary, export, splits)
    assert "Nothing was found" in (tmp_path / "dataset.html").read_text()


class Page(html.parser.HTMLParser):
    """What a page refers to, and the text of its JSON."""

    def __init__(self, text):
        super().__init__()
        self.references, self.tags, self.scripts, self.data = [], [], 0, ""
        self.in_data = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for key, value in attrs if key in ("src", "href", "srcset", "action")]
        self.in_data = ("id", "data") in attrs

    def handle_data(self, text):
        if self.in_data:
            self.data += text

    def handle_endtag(self, tag):
        self.in_data = False


def test_one_file_of_safe_text(dataset, tmp_path):
    """Nothing is fetched, names are text, and a picture is there once, however often it is shown."""
    export, splits, summary = dataset
    file = tmp_path / "dataset.html"
    write_dataset_page(file, summary, export, splits)
    text = file.read_text()
    page = Page(text)
    assert all(x.startswith(("#", "data:")) for x in page.references)
    assert (
        page.tags.count("script") == 2 and "b" not in page.tags[page.tags.index("table") : page.tags.index("section")]
    )
    assert "alert(1)</script>" not in text
    data = json.loads(page.data)
    assert data["pictures"].keys() == {"1", "2", "3"} and NAME in data["hues"]
    assert data["pictures"]["1"]["objects"] == [[NAME, 0, 0, 10, 40], [NAME, -5, 10, 16, 16]]
    assert text.count("data:image/jpeg") == 3


def test_a_large_dataset_stays_a_small_file(tmp_path):
    """2000 pictures with as many problems: 60 and 24 of them are shown."""
    noise = np.random.default_rng(0).integers(0, 255, (336, 448, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    images = [{"id": i, "file_name": str(tmp_path / "a.jpg"), "width": 448, "height": 336} for i in range(1, 2001)]
    annotations = [
        {"image_id": i, "category_id": 1 + i % 3, "bbox": [1, 1, 9, 9], "iscrowd": 0} for i in range(1, 2001)
    ]
    export = Export(
        "COCO",
        {"images": images, "annotations": annotations, "categories": [{"id": i, "name": f"{i}"} for i in (1, 2, 3)]},
    )
    splits = ["train"] * 2000
    summary = summarize("mine", export, splits, [Problem("box", "a box", i) for i in range(1, 2001)])
    classes = [annotations[i]["category_id"] for i in summary.shown]
    assert len(summary.shown) == 60 and sorted(map(classes.count, (1, 2, 3))) == [20, 20, 20]
    write_dataset_page(tmp_path / "dataset.html", summary, export, splits)
    assert (tmp_path / "dataset.html").stat().st_size < 15e6
    assert "<b>2000</b>" in (tmp_path / "dataset.html").read_text()


# What a person does with it, by clicks and keys; what they then see is written where the test finds it.
ACTIONS = """
<script>
const seen = {};
const dialog = document.querySelector("dialog");
const press = (key) => dialog.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const choose = (id, value) => { byId(id).value = value; byId(id).dispatchEvent(new Event("change")); };
seen.drawn = document.querySelectorAll("figure svg.picture").length;
seen.status = byId("shown-number").textContent;
document.querySelector("#gallery button").click();
seen.opened = dialog.open;
seen.first = byId("large-caption").textContent;
press("ArrowRight");
seen.second = byId("large-caption").textContent;
press("ArrowLeft"); press("ArrowLeft");
seen.last = byId("large-caption").textContent;
byId("close").click();
seen.closed = !dialog.open;
choose("split-filter", "val");
seen.val = byId("shown-number").textContent;
choose("class-filter", "bird");
seen.birds = byId("shown-number").textContent;
choose("class-filter", ""); choose("split-filter", "");
seen.boxes = document.querySelectorAll("#gallery svg rect").length;
byId("show-boxes").checked = false;
byId("show-boxes").dispatchEvent(new Event("change"));
seen.noBoxes = document.querySelectorAll("#gallery svg rect").length;
seen.marked = document.querySelector("rect.marked").getAttribute("x");
seen.view = document.querySelector("rect.marked").parentElement.getAttribute("viewBox");
document.querySelector("#class-table button").click();
seen.names = [...document.querySelectorAll("#class-table tbody td:first-child")].map((x) => x.textContent);
document.body.dataset.seen = JSON.stringify(seen);
</script></body>
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_in_a_browser(dataset, tmp_path):
    export, splits, summary = dataset
    file = tmp_path / "dataset.html"
    write_dataset_page(file, summary, export, splits)
    file.write_text(file.read_text().replace("</body>", ACTIONS))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', done.stdout)[1]))
    captions = [f"{i + 1}.png, {splits[i]}. " for i in summary.shown]
    assert seen.pop("first").startswith(captions[0]) and seen.pop("second").startswith(captions[1])
    assert seen.pop("last").startswith(captions[-1])
    assert seen == {
        "drawn": 3 + 1 + 4,  # the gallery, the box that sticks out, two pairs
        "status": "3 of 3 pictures",
        "opened": True,
        "closed": True,
        "val": "2 of 3 pictures",
        "birds": "0 of 3 pictures",
        "boxes": 4,
        "noBoxes": 0,
        "marked": "-5",
        "view": "-5 0 105 50",
        "names": [NAME, "bird"],
    }
