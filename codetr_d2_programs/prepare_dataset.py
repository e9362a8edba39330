"""Make a dataset of a labelling tool's export, a page that shows it, and a config that is ready to train on it.

    codetr_d2 prepare-dataset SOURCE --output datasets/mine
    codetr_d2 train --config-file datasets/mine/config.yaml

SOURCE is an unpacked folder, or an annotation file: COCO json, YOLO with data.yaml or classes.txt, Pascal VOC, LabelMe,
CVAT for images 1.1, Label Studio JSON, CSV, as these tools, Roboflow and others write them. A split that the export has
is kept; otherwise some pictures are chosen for validation. docs/your_data.md has an example of each, and the rules.
"""

import argparse
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tabulate import tabulate

from codetr_d2.config.suggest import DatasetFacts, Machine, suggest_config, write_config
from codetr_d2.data.checks_of_dataset import find_problems, picture_prints
from codetr_d2.data.formats import FORMATS, Export, Problem, read_export
from codetr_d2.data.formats.write import write_coco_folder
from codetr_d2.data.split import split_images
from codetr_d2.data.tiles import cut_into_tiles
from codetr_d2.errors import InputError, named_disk_problems
from codetr_d2.report.dataset_page import summarize, write_dataset_page

from . import prepare_efficientnet


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write a number between 0 and 1, like 0.15")
    return value


def gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no memory; write a number of gigabytes, like 24")
    return value


def side(text: str) -> int:
    if not text.isdecimal() or int(text) < 32:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no side of a tile; write a number of pixels from 32 on, like 512"
        )
    return int(text)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder or annotation file of the export")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write, which must be new")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the pictures, if not that of the export")
    parser.add_argument("--format", choices=FORMATS, default="", help="where SOURCE has several formats")
    parser.add_argument("--copy", action="store_true", help="copy the pictures instead of linking to them")
    parser.add_argument(
        "--tile", type=side, metavar="PIXELS", help="cut large pictures into tiles of so many pixels a side"
    )
    split = parser.add_argument_group("where the export has no split")
    split.add_argument("--val", type=share, default=0.15, metavar="SHARE", help="for validation (default: %(default)s)")
    split.add_argument("--seed", type=int, default=0, help="of the choice (default: %(default)s)")
    split.add_argument("--group-by-folder", action="store_true", help="keep the pictures of a folder together")
    machine = parser.add_argument_group("what is trained on")
    machine.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    machine.add_argument("--memory-gb", type=gigabytes, metavar="GB", help="of the GPU (default: all that it has)")
    return parser.parse_args(argv)


def find_machine(args: argparse.Namespace) -> Machine:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        if args.memory_gb:
            raise InputError("--memory-gb is for a GPU; leave it out, or name --device cuda")
        return Machine("cpu")
    if not args.memory_gb and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no GPU here; say with --memory-gb how much memory yours has")
    return Machine("cuda", args.memory_gb or torch.cuda.get_device_properties(0).total_memory / 2**30)


def describe(coco: dict, splits: list[str]) -> str:
    """A table of the images and objects of each split."""
    split_of = {image["id"]: split for image, split in zip(coco["images"], splits)}
    names = {x["id"]: x["name"] for x in coco["categories"]}
    objects = Counter((split_of[x["image_id"]], names[x["category_id"]]) for x in coco["annotations"])
    used = [x for x in ("train", "val", "test") if x in splits]
    rows = [["pictures", *(splits.count(x) for x in used)]]
    rows += [["objects", *(sum(n for (split, _), n in objects.items() if split == x) for x in used)]]
    rows += [[f"  {name}", *(objects[x, name] for x in used)] for name in list(names.values())[:20]]
    if len(names) > 20:
        rows.append([f"  ... {len(names) - 20} further classes"])
    return tabulate(rows, headers=["", *used], tablefmt="github")


def read_and_split(args: argparse.Namespace) -> tuple[Export, list[str], list[Problem]]:
    """The export, the split of each of its pictures, and what looks wrong."""
    export = read_export(args.source.expanduser(), args.images and args.images.expanduser(), args.format)
    prints, unreadable = picture_prints(export.coco["images"])
    if unreadable:
        broken = {x.image_id for x in unreadable}
        prints = prints[[x["id"] not in broken for x in export.coco["images"]]]
        export.leave_out(unreadable)
    images = export.coco["images"]
    classes = defaultdict(set)
    for annotation in export.coco["annotations"]:
        classes[annotation["image_id"]].add(annotation["category_id"])
    groups = [Path(x["file_name"]).parent if args.group_by_folder else x["id"] for x in images]
    splits = split_images(images, [classes[x["id"]] for x in images], args.val, args.seed, groups)
    return export, splits, [*export.problems, *find_problems(export.coco, splits, prints)]


def cut(export: Export, splits: list[str], problems: list[Problem], size: int, folder: Path):
    """The same for tiles. What looks wrong is of the pictures, which are named instead of shown."""
    names = {x["id"]: Path(x["file_name"]).name for x in export.coco["images"]}
    problems = [
        replace(x, detail=f"{names[x.image_id]}: {x.detail}", image_id=None, other_image_id=None) if x.image_id else x
        for x in problems
    ]
    with named_disk_problems(str(folder)):
        coco, splits = cut_into_tiles(export.coco, splits, size, folder)
    return Export(export.format, coco), splits, problems


def prepare(args: argparse.Namespace, tiles: Path) -> None:
    """Do it all; ``tiles`` is an empty folder that is removed afterwards."""
    machine = find_machine(args)
    output = args.output.expanduser().absolute()
    export, splits, problems = read_and_split(args)
    if args.tile:
        export, splits, problems = cut(export, splits, problems, args.tile, tiles)
    datasets = write_coco_folder(export, splits, output, args.copy or bool(args.tile))
    facts = DatasetFacts.of_coco(export.coco, [x == "train" for x in splits])
    suggestion = suggest_config(facts, machine)
    # The small model starts from what the quick start does.
    weights = prepare_efficientnet.DEFAULT_FILE.absolute() if suggestion.base.startswith("quick_start/") else None
    with named_disk_problems(str(output)):
        write_config(output / "config.yaml", suggestion, datasets, f"output/{output.name}", str(weights or ""))
        summary = summarize(output.name, export, splits, problems)
        write_dataset_page(output / "dataset.html", summary, export, splits)
    print(f"Read as {export.format}.\n")
    print(describe(export.coco, splits))
    if problems:
        print("\nWhat looks wrong; dataset.html has all of it:")
    for kind, found in summary.problems.items():
        print(f"  {len(found)} x {kind}; first: {found[0].detail}")
    print(f"\nLook at it: {output / 'dataset.html'}")
    if weights and not weights.is_file():
        prepare_efficientnet.prepare(weights)
    if suggestion.advice:
        print(f"Note: {suggestion.advice}")
    time = f" ({suggestion.time})" if suggestion.time else ""
    print(f"Next:  codetr_d2 train --config-file {output / 'config.yaml'}{time}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        with tempfile.TemporaryDirectory() as tiles:
            prepare(args, Path(tiles))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
