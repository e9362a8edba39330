"""Pictures of the analyses. They can be read in grey: line styles, markers and brightness say what colours say."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path

import numpy as np
from detectron2.data.detection_utils import convert_image_to_rgb
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..errors import named_disk_problems

__all__ = [
    "Line",
    "Look",
    "Scatter",
    "draw_bars",
    "draw_boxes",
    "draw_dots",
    "draw_lines",
    "draw_looks",
    "draw_maps",
    "draw_matrices",
    "draw_scatters",
    "line_styles",
    "pale",
    "save",
    "show_picture",
    "to_rgb",
]

DPI = 150
TILE = 2.6  # inches that a picture in a grid is wide
BOX_COLOUR = "#ff3030"


@dataclass
class Line:
    """A curve with its label; ``x`` and ``y`` are sequences of equal length."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def line_styles() -> Iterator[dict]:
    """Styles of lines that stay apart in grey: dashes, markers and colours change together."""
    colours = cycle(["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9"])
    for _, colour, dashes, marker in zip(count(), colours, cycle(["-", "--", "-.", ":"]), cycle("osv^DPX*")):
        yield {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 5, "linewidth": 1.8}


@dataclass
class Look:
    """Where a query looks in a picture.

    Attributes:
        score: of its detection.
        box: [1, 4] xyxy in pixels of the picture.
        points: [N, 2] (x, y) in pixels of the picture.
        weights: [N] what each of them counts; they add up to 1.
    """

    score: float
    box: Tensor
    points: Tensor
    weights: Tensor


@dataclass
class Scatter:
    """A picture with points on it.

    Attributes:
        picture: [H, W, 3] uint8 RGB.
        boxes: [N, 4] of the objects, xyxy in pixels of the picture.
        points: by their kind, "positive", "negative" or "original", [M, 2] (x, y) in pixels of the picture.
    """

    picture: np.ndarray
    boxes: Tensor
    points: dict[str, Tensor]


def draw_lines(
    path: Path,
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    is_share: bool = False,
) -> None:
    """Draw curves with their legend.

    Args:
        path: of the PNG.
        lines: in the order of the legend.
        title, x_label, y_label: the latter with their units.
        is_share: both axes go from 0 to 1, and the diagonal is drawn.
    """
    figure = Figure(figsize=(6.5, 6.4 + 0.2 * len(lines)) if is_share else (8, 5), layout="constrained")
    axes = figure.subplots()
    if is_share:
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="chance (area 0.500)")
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    for line, style in zip(lines, line_styles()):
        axes.plot(line.x, line.y, label=line.label, markevery=max(1, len(line.x) // 12), **style)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    if is_share:
        figure.legend(loc="outside lower center", ncols=1 if len(lines) < 6 else 2, frameon=False)
    else:
        axes.legend()
    save(figure, path)


def draw_maps(
    path: Path,
    pictures: Sequence[tuple[np.ndarray, Tensor]],
    maps: dict[str, Sequence[Tensor]],
    *,
    title: str,
    colour_label: str,
) -> None:
    """Draw a row for each image: the picture with its ground truth, and its maps.

    Each map goes from its lowest value (dark) to its highest (bright), which are written below it: the norms of
    normalised features differ little.

    Args:
        path: of the PNG.
        pictures: of each image [H, W, 3] uint8 RGB and the boxes of its objects, [N, 4] xyxy in pixels of it.
        maps: by the title of the column, for each image a map [H, W].
        title: of the whole.
        colour_label: what the colours mean.
    """
    rows, columns = len(pictures), 1 + len(maps)
    ratio = max(picture.shape[0] / picture.shape[1] for picture, _ in pictures)
    figure = Figure(figsize=(TILE * columns + 0.8, min(ratio, 1.5) * TILE * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, (picture, boxes) in zip(grid, pictures):
        show_picture(row[0], picture)
        draw_boxes(row[0], boxes)
    grid[0, 0].set_title("image and ground truth", fontsize=9)
    for column, (name, values) in zip(grid.T[1:], maps.items()):
        column[0].set_title(name, fontsize=9)
        for axes, value, (_, boxes) in zip(column, values, pictures):
            axes.imshow(value, cmap="viridis", interpolation="nearest")
            axes.set(xticks=[], yticks=[], xlabel=f"{value.min():.4f} to {value.max():.4f}")
            axes.xaxis.label.set_size(8)
            draw_boxes(axes, boxes, colour="white", width=0.8)
    scale = ScalarMappable(Normalize(0, 1), "viridis")
    bar = figure.colorbar(scale, ax=grid[:, 1:], label=colour_label, shrink=0.6, ticks=[0, 1])
    bar.ax.set_yticklabels(["lowest\nof the map", "highest\nof the map"])
    figure.suptitle(title)
    save(figure, path)


def draw_looks(path: Path, pictures: dict[str, Sequence[tuple[np.ndarray, Sequence[Look]]]]) -> None:
    """Draw a row for each image, and in it for each model the picture with where each of its best queries looks.

    Args:
        path: of the PNG.
        pictures: by the model's name, for each image the picture [H, W, 3] uint8 RGB and the queries.
    """
    models = list(pictures)
    columns = [(name, i) for name in models for i in range(max(len(looks) for _, looks in pictures[name]))]
    rows = len(pictures[models[0]])
    ratio = max(picture.shape[0] / picture.shape[1] for picture, _ in pictures[models[0]])
    size = (TILE * len(columns), (min(ratio, 1.5) * TILE + 0.25) * rows + 1.1)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, i) in zip(grid.T, columns):
        for axes, (picture, looks) in zip(column, pictures[name]):
            show_picture(axes, pale(picture))
            if i < len(looks):
                look = looks[i]
                draw_boxes(axes, look.box)
                x, y = (look.points - 0.5).T
                axes.scatter(x, y, s=600 * look.weights, c="#0050b0", alpha=0.6, linewidths=0)
                axes.set_title(f"{name}: query {i + 1}, score {look.score:.2f}", fontsize=8)
            axes.set(xlim=(-0.5, picture.shape[1] - 0.5), ylim=(picture.shape[0] - 0.5, -0.5))
    figure.suptitle(
        "Where the queries with the best scores look in the last decoder layer\n"
        "dots: points of all heads, their area is the weight; box: the prediction",
        fontsize=10,
    )
    save(figure, path)


def draw_scatters(path: Path, pictures: dict[str, Sequence[Scatter]], *, title: str) -> None:
    """Draw a row for each image and a column for each list of pictures, with a legend of the kinds of points.

    Args:
        path: of the PNG.
        pictures: by the title of the column.
        title: of the whole.
    """
    styles = {
        "original": {"marker": "+", "c": "0.25", "s": 14, "linewidths": 0.7},
        "negative": {"marker": "x", "c": "#d55e00", "s": 18, "linewidths": 1.1},
        "positive": {"marker": "o", "c": "#0050b0", "s": 16, "linewidths": 0.4, "edgecolors": "white"},
    }
    rows = len(next(iter(pictures.values())))
    ratio = max(x.picture.shape[0] / x.picture.shape[1] for x in next(iter(pictures.values())))
    size = (max(TILE * len(pictures), 5.5), min(ratio, 1.5) * TILE * rows + 1.2)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, len(pictures), squeeze=False)
    for column, (name, scatters) in zip(grid.T, pictures.items()):
        column[0].set_title(name, fontsize=9)
        for axes, scatter in zip(column, scatters):
            show_picture(axes, pale(scatter.picture))
            draw_boxes(axes, scatter.boxes)
            for kind, style in styles.items():
                x, y = (scatter.points[kind] - 0.5).T
                axes.scatter(x, y, label=f"{kind} queries", **style)
            axes.set(xlim=(-0.5, scatter.picture.shape[1] - 0.5), ylim=(scatter.picture.shape[0] - 0.5, -0.5))
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, markerscale=1.5)
    figure.suptitle(title)
    save(figure, path)


def pale(picture: np.ndarray) -> np.ndarray:
    """A picture, [H, W, 3] uint8, in light shades of grey, on which points are seen."""
    grey = picture.mean(axis=2, keepdims=True).repeat(3, axis=2)
    return (255 - (255 - grey) * 0.35).astype(np.uint8)


def to_rgb(image: Tensor, image_format: str) -> np.ndarray:
    """An input of a model, [C, H, W] with the channels of ``INPUT.FORMAT`` -> [H, W, 3] uint8 RGB."""
    picture = convert_image_to_rgb(image.permute(1, 2, 0), image_format)
    return np.asarray(picture).clip(0, 255).astype(np.uint8)


def show_picture(axes: Axes, picture: np.ndarray) -> None:
    """Show a picture, [H, W, 3] uint8 RGB, without scales."""
    axes.imshow(picture)
    axes.set_axis_off()


def draw_boxes(axes: Axes, boxes: Tensor, colour: str = BOX_COLOUR, width: float = 1.5, dashes: str = "-") -> None:
    """Draw boxes, [N, 4] xyxy in pixels of what the axes show."""
    for x0, y0, x1, y1 in boxes.tolist():
        # The axes count from the centre of the first pixel.
        corner = (x0 - 0.5, y0 - 0.5)
        axes.add_patch(
            Rectangle(corner, x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=width, linestyle=dashes)
        )


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG.

    Raises:
        InputError: the disk is full or broken.
    """
    with named_disk_problems(str(path)):
        figure.savefig(path, dpi=DPI)


def bar_styles() -> Iterator[dict]:
    """Styles of bars that stay apart in grey: brightness and hatches change together."""
    for colour, hatch in zip(
        cycle(["#0072b2", "#e69f00", "#dddddd", "#cc79a7"]), cycle(["", "//", "..", "xx", "\\\\"])
    ):
        yield {"color": colour, "hatch": hatch, "edgecolor": "black", "linewidth": 0.6}


def draw_bars(
    path: Path,
    panels: dict[str, dict[str, dict[str, float]]],
    *,
    title: str,
    legend: dict[str, str] | None = None,
    order: Sequence[str] = (),
) -> None:
    """Draw horizontal bars with their numbers: a panel for each quantity, a group of bars for each place.

    Args:
        path: of the PNG.
        panels: by the quantity with its unit, the series (a model) and the place (a part of it) a number. A place that
            a series lacks has no bar.
        title: of the whole.
        legend: what the legend calls the series, where that is more than their names.
        order: of the places; those that are not in it come last.
    """
    found = dict.fromkeys(place for panel in panels.values() for values in panel.values() for place in values)
    places = [*(x for x in order if x in found), *(x for x in found if x not in order)]
    series = list(next(iter(panels.values())))
    thickness = 0.8 / len(series)
    height = max(2.5, 0.9 + 0.22 * len(places) * (len(series) + 0.6)) + 0.25 * len(series)
    figure = Figure(figsize=(1.5 + 3.2 * len(panels), height), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (quantity, panel) in zip(grid, panels.items()):
        for i, (name, style) in enumerate(zip(series, bar_styles())):
            values = panel[name]
            at = [places.index(place) + (i - (len(series) - 1) / 2) * thickness for place in values]
            bars = axes.barh(at, list(values.values()), thickness, label=(legend or {}).get(name, name), **style)
            axes.bar_label(bars, [f"{x:.3g}" for x in values.values()], padding=2, fontsize=7)
        axes.set(xlabel=quantity)
        axes.margins(x=0.18)
        axes.set_xlim(left=0)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    grid[0].set_yticks(range(len(places)), places)
    grid[0].invert_yaxis()
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower left", ncols=1, frameon=False)
    figure.suptitle(title)
    save(figure, path)


def draw_dots(path: Path, values: dict[str, Sequence[float]], *, title: str, x_label: str) -> None:
    """Draw a row for each kind of repeated measurement: a dot for each value, and a line at their mean.

    Args:
        path: of the PNG.
        values: by the label of the row, the first one on top.
        title: of the whole.
        x_label: with the unit.
    """
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(values)), layout="constrained")
    axes = figure.subplots()
    for i, numbers in enumerate(values.values()):
        mean = sum(numbers) / len(numbers)
        axes.plot([mean, mean], [i - 0.32, i + 0.32], color="black", linewidth=2)
        axes.plot(numbers, [i] * len(numbers), "o", color="#0072b2", markersize=6, alpha=0.75, markeredgewidth=0)
        axes.annotate(f"{mean:.1f}", (max(numbers), i), (8, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set(title=title, xlabel=x_label)
    axes.set_yticks(range(len(values)), values)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.grid(axis="x", alpha=0.3)
    save(figure, path)


def draw_matrices(
    path: Path,
    matrices: dict[str, tuple[Sequence[str], Tensor]],
    *,
    title: str,
    row_label: str,
    column_label: str,
) -> None:
    """Draw square matrices side by side, with their numbers; the darker, the larger, on one scale.

    Args:
        path: of the PNG.
        matrices: by the title of each the names of its rows and columns, and [N, N] numbers that are not negative.
        title: of the whole.
        row_label, column_label: what rows and columns are.
    """
    side = max(3.2, 0.85 * max(len(names) for names, _ in matrices.values()) + 1.2)
    figure = Figure(figsize=(max(side * len(matrices), 8), side + 0.6), layout="constrained")
    largest = max(matrix.max().item() for _, matrix in matrices.values())
    for axes, (name, (labels, matrix)) in zip(figure.subplots(1, len(matrices), squeeze=False)[0], matrices.items()):
        axes.imshow(matrix, cmap="Greys", vmin=0, vmax=largest or 1)
        for i, row in enumerate(matrix.tolist()):
            for j, value in enumerate(row):
                colour = "white" if value > 0.5 * largest else "black"
                axes.text(j, i, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=8)
        axes.set(title=name, xlabel=column_label, ylabel=row_label)
        axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        axes.set_yticks(range(len(labels)), labels)
    figure.suptitle(title)
    save(figure, path)
