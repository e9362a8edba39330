"""The page in a real Chromium, by hand's and keyboard's ways."""

import re
import shutil

import pytest

from codetr_d2.report.run import read_run
from codetr_d2.report.run_page import page_data, write_run_page
from tests.report.tiny_report import CLASS_NAMES, copy_with_other_scores

pytestmark = pytest.mark.slow

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright, and apt install chromium"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("there is no Chromium: apt install chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    write_run_page([run], file)
    return file


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as instance:
        chromium = instance.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser):
    """Open a file; afterwards nothing was fetched, and nothing went wrong in the page."""
    pages = []

    def open_it(file, **options):
        page = browser.new_page(viewport={"width": 1300, "height": 900}, **options)
        page.problems, page.requests = [], []
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(file.as_uri())
        pages.append((page, file))
        return page

    yield open_it
    for page, file in pages:
        assert page.problems == []
        assert {x for x in page.requests if not x.startswith("data:image/jpeg")} == {file.as_uri()}
        page.close()


def shown_score(page):
    return float(page.locator("#score-value").inner_text())


def set_score(page, percent):
    page.locator("#score").evaluate("(x, v) => { x.value = v; x.dispatchEvent(new Event('input')); }", percent)
    page.wait_for_function(
        "v => document.querySelector('#error-table caption').textContent.includes(v)", arg=f"{percent / 100:.2f}"
    )


def error_numbers(page):
    rows = page.locator("#error-table tbody tr")
    return {row.locator("th").inner_text(): int(row.locator("td").nth(1).inner_text()) for row in rows.all()}


def counted(data, least, task="bbox", k=None):
    """By kind of error, from the data of the page."""
    numbers = dict.fromkeys(data["kinds"], 0)
    for kind, of_class, last, number in data["runs"][0]["tasks"][task]["counts"]:
        name = data["kinds"][kind]
        if (last < least if name == "missed" else last >= least) and k in (None, of_class):
            numbers[name] += number
    return numbers


def test_everything_is_drawn(report, open_page, data):
    page = open_page(report)
    numbers = data["runs"][0]["tasks"]["bbox"]
    assert page.title() == "run: report" and page.locator("h1").inner_text() == "run"
    tiles = dict(zip(page.locator("#tiles dt").all_inner_texts(), page.locator("#tiles dd").all_inner_texts()))
    assert tiles["AP"].startswith(f"{numbers['overall']['AP']:.1f}") and "Parameters" in tiles
    assert page.locator("#class-table tbody th").all_inner_texts() == [*CLASS_NAMES, "mean"]
    first = page.locator("#class-table tbody tr").first.locator("td").all_inner_texts()
    assert first[:2] == [str(numbers["classes"][0]["objects"]), f"{numbers['classes'][0]['AP']:.1f}"]
    assert page.locator("#curve-charts svg.chart").count() == 4
    lines = page.locator("#curve-charts svg.chart").first.locator("path.line")
    assert lines.count() == 4 and all(len(x.get_attribute("d")) > 500 for x in lines.all())
    assert shown_score(page) == numbers["best_bin"] / 100
    assert error_numbers(page) == counted(data, numbers["best_bin"])
    assert page.locator("#confusion-table tbody tr").count() == 5
    assert page.locator("#training-charts figcaption").all_inner_texts() == [
        "Average precision (%)",
        "Total loss",
        "Losses of the detector",
        "Learning rate",
        "Gradient norm",
        "Seconds per iteration",
    ]
    assert page.locator(".card").count() == 8
    width = page.locator(".card img").first.evaluate("x => [x.complete, x.naturalWidth]")
    assert width == [True, 100]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_score_slider(report, open_page, data):
    page = open_page(report)
    for percent in (20, 70, 99):
        set_score(page, percent)
        assert error_numbers(page) == counted(data, percent)
        boxes = page.locator(".card").first.locator("[data-kind]").count()
        file = page.locator(".card").first.get_attribute("aria-label").split(",")[0]
        (picture,) = [x for x in data["pictures"] if x["file"].endswith(f"/{file}")]
        assert boxes == sum(x["bbox"][1] >= 100 * percent for x in picture["runs"][0])
    page.locator("#best-score").click()
    assert shown_score(page) == data["runs"][0]["tasks"]["bbox"]["best_bin"] / 100


def test_masks_and_class(report, open_page, data):
    page = open_page(report)
    numbers = data["runs"][0]["tasks"]["segm"]
    least = numbers["best_bin"]
    page.get_by_label("Masks", exact=True).check()
    assert error_numbers(page) == counted(data, least, "segm")
    assert (
        page.locator("#tiles dd")
        .first.inner_text()
        .startswith(f"{data['runs'][0]['tasks']['segm']['overall']['AP']:.1f}")
    )
    page.get_by_label("Class", exact=True).select_option("dog")
    assert error_numbers(page) == counted(data, least, "segm", 1)
    assert page.locator("#class-table tr.chosen th").inner_text() == "dog"
    # Of each object there is the outline, of each detection the area; where there are no detections, both are areas.
    objects = page.locator(".card [data-truth]").count()
    assert page.locator(".card [data-truth] .mask.dashed").count() == objects > 0
    assert page.locator(".card [data-kind] .mask:not(.dashed)").count() == page.locator(".card [data-kind]").count() > 0
    page.get_by_label("predictions").uncheck()
    assert page.locator(".card .mask").count() == objects and page.locator(".card .mask.dashed").count() == 0
    page.get_by_label("predictions").check()
    page.get_by_label("masks", exact=True).uncheck()
    assert page.locator(".card .mask").count() == 0
    page.get_by_label("predictions").uncheck()
    assert page.locator("[data-kind]").count() == 0 and page.locator("[data-truth]").count() > 0
    page.get_by_label("ground truth").uncheck()
    assert page.locator("[data-truth]").count() == 0


def test_long_names_are_told_apart_by_their_ends(report, open_page, tmp_path):
    name = "2019_YELL_2_541000_4977000_image_crop_0000_025"
    file = tmp_path / "long.html"
    file.write_text(re.sub(r'(\d)\.png"', rf'{name}\1.png"', report.read_text()))
    page = open_page(file)
    page.get_by_label("Order").select_option("by file name")
    names = page.locator(".card-text span:first-child").all_inner_texts()
    assert names == [f"2019_YEL…op_0000_025{i}.png" for i in range(8)]


def test_filter_by_kind_of_error(report, open_page, data):
    page = open_page(report)
    set_score(page, 60)
    for kind in ("class", "duplicate", "background"):
        page.get_by_label("With", exact=True).select_option(f"errors: {kind}")
        there = [[x["bbox"] for x in picture["runs"][0]] for picture in data["pictures"]]
        expected = sum(any(name == kind and points >= 6000 for name, points in own) for own in there)
        assert page.locator(".card").count() == expected
        assert page.locator("#gallery-count").inner_text().startswith(f"{expected} of 8")
    page.get_by_label("With", exact=True).select_option("missed objects")
    expected = sum(any(x["runs"][0]["bbox"][1] < 60 and not x["crowd"] for x in p["objects"]) for p in data["pictures"])
    assert page.locator(".card").count() == expected
    # The table of errors leads there too.
    page.locator("#error-table").get_by_role("button", name="location").click()
    assert page.get_by_label("With", exact=True).input_value() == "location"
    page.get_by_label("With", exact=True).select_option("anything")
    errors = [
        int(x.split()[0]) for x in page.locator(".card-text span:last-child").all_inner_texts() if x != "no error"
    ]
    assert errors == sorted(errors, reverse=True) and errors
    page.get_by_label("Order").select_option("by file name")
    assert page.locator(".card-text span:first-child").all_inner_texts() == [f"{i}.png" for i in range(8)]


def test_table_sorts_by_keyboard(report, open_page):
    page = open_page(report)

    def values():
        return [x.locator("td").nth(1).inner_text() for x in page.locator("#class-table tbody tr").all()][:-1]

    page.locator("#class-table thead button", has_text="AP").first.focus()
    page.keyboard.press("Enter")
    down = values()
    assert down[:3] == sorted(down[:3], key=float, reverse=True) and down[3] == "–"  # the class without objects is last
    assert page.locator('#class-table th[aria-sort="descending"]').inner_text().startswith("AP")
    page.keyboard.press("Enter")  # the focus has stayed
    assert values()[:3] == down[2::-1]
    assert page.locator("#class-table tbody tr").last.locator("th").inner_text() == "mean"


def test_zoom(report, open_page):
    page = open_page(report)
    page.locator(".card").first.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    title = dialog.locator("h2").inner_text()
    assert "(100 × 100)" in title and dialog.locator("text.box-label").count() > 0
    frame = dialog.locator(".frame")
    before = frame.bounding_box()
    page.keyboard.type("+")
    assert frame.bounding_box()["width"] == pytest.approx(1.4 * before["width"], rel=0.01)
    area = dialog.locator(".pane").bounding_box()
    page.mouse.move(area["x"] + 100, area["y"] + 100)
    page.mouse.wheel(0, -100)
    page.wait_for_timeout(100)
    assert frame.bounding_box()["width"] > 1.6 * before["width"]
    left = frame.bounding_box()["x"]
    page.mouse.down()
    page.mouse.move(area["x"] + 160, area["y"] + 130)
    page.mouse.up()
    assert frame.bounding_box()["x"] == pytest.approx(left + 60, abs=1)
    page.keyboard.press("0")
    assert frame.bounding_box() == pytest.approx(before, abs=1)
    page.keyboard.press("ArrowRight")
    assert dialog.locator("h2").inner_text() != title
    dialog.get_by_role("button", name="Previous picture").click()
    assert dialog.locator("h2").inner_text() == title and dialog.locator("tbody tr").count() > 0
    page.keyboard.press("Escape")
    assert page.locator("#zoom[open]").count() == 0
    assert page.evaluate("document.activeElement.className") == "card"


def test_keyboard_reaches_every_control_and_says_where_it_is(report, open_page):
    """By the tabulator alone; each has a name, and an outline while it has the focus."""
    page = open_page(report)
    reached, unnamed = set(), []
    for _ in range(150):
        page.keyboard.press("Tab")
        here = page.evaluate(
            """() => {
                const x = document.activeElement, style = getComputedStyle(x);
                const label = x.labels?.length ? x.labels[0].textContent : "";
                const name = x.getAttribute("aria-label") || label.trim() || x.textContent.trim() || x.title;
                return [x.id || x.getAttribute("class") || x.tagName, name, style.outlineStyle !== "none"];
            }"""
        )
        if here[0] == "BODY":
            break
        reached.add(here[0])
        if not here[1] or not here[2]:
            unnamed.append(here)
    assert unnamed == []
    controls = {"theme", "score", "best-score", "class", "as-share", "kind", "order", "show-truth", "show-found"}
    controls |= {"show-masks", "show-labels", "card", "log", "option", "config", "skip", "chart"}
    assert controls <= reached
    page.locator("#score").focus()
    before = shown_score(page)
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"document.querySelector('#score-value').textContent === '{before + 0.01:.2f}'")
    chart = page.locator("#curve-charts svg.chart").nth(1)
    chart.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#curve-charts figure").nth(1).locator("output").inner_text().startswith("score 0")
    assert page.locator("#tip").is_visible()


def test_tables_and_charts_have_names(report, open_page):
    page = open_page(report)
    tables = page.locator("main table")
    assert tables.count() >= 6 and all(x.locator("caption").inner_text() for x in tables.all())
    assert all(x.get_attribute("aria-label") for x in page.locator("svg.chart").all())
    assert all(x.get_attribute("scope") for x in page.locator("main th").all())
    headings = page.locator("main section").all()
    assert all(x.get_attribute("aria-labelledby") for x in headings)


def test_light_and_dark(report, open_page):
    colours = []
    for scheme in ("light", "dark"):
        page = open_page(report, color_scheme=scheme)
        colour = "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)"
        colours.append(page.evaluate(colour))
        page.locator("#theme").click()
        colours.append(page.evaluate(colour))
    assert colours[0] == colours[3] and min(colours[0]) > 200 and colours[1] == colours[2] and max(colours[1]) < 60


def test_two_runs_side_by_side(run, tmp_path, open_page):
    other = read_run(copy_with_other_scores(run.folder, tmp_path / "other", seed=1))
    file = tmp_path / "comparison.html"
    write_run_page([run, other], file, with_cost=False)
    data = page_data([run, other], with_cost=False)
    page = open_page(file)
    assert page.locator("h1").inner_text() == "run and other"
    ap = [[x["AP"] for x in one["tasks"]["bbox"]["classes"][:3]] for one in data["runs"]]
    gains = sorted(b - a for a, b in zip(*ap))
    shown = [x.locator("td").nth(3).inner_text() for x in page.locator("#class-table tbody tr").all()]
    assert [float(x) for x in shown[:3]] == pytest.approx(gains, abs=0.051) and shown[3] == "–"
    assert not page.locator("#confusion").is_visible()
    names = page.locator(".card-text span:first-child").all_inner_texts()
    assert names == [x["file"].split("/")[-1] for x in data["pictures"]]  # the greatest differences first
    panes = page.locator(".card").first.locator(".pane")
    assert panes.locator("b").all_inner_texts() == ["run", "other"]
    least = round(100 * shown_score(page))
    assert [x.locator("[data-kind]").count() for x in panes.all()] == [
        sum(x["bbox"][1] >= 100 * least for x in found) for found in data["pictures"][0]["runs"]
    ]
    page.locator(".card").first.click()
    assert page.locator("#zoom .pane").count() == 2
