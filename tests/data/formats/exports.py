"""The smallest export of each tool, written by hand: three pictures, two classes, two boxes and a polygon.

=========== ======= ==================================================
picture     size    objects, as [x, y, width, height] in pixels
=========== ======= ==================================================
a.png       64x48   cat [10, 12, 20, 16]; dog [30, 5, 20, 20], the
                    triangle (30, 5), (50, 5), (50, 25)
b.jpg       80x60   cat [8, 6, 40, 30]
empty.png   40x40   none
=========== ======= ==================================================
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = {"a.png": (64, 48), "b.jpg": (80, 60), "empty.png": (40, 40)}
BOXES = {
    "a.png": [("cat", [10, 12, 20, 16]), ("dog", [30, 5, 20, 20])],
    "b.jpg": [("cat", [8, 6, 40, 30])],
    "empty.png": [],
}
TRIANGLE = [30, 5, 50, 5, 50, 25]


def write_pictures(folder: Path, names=tuple(SIZES)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        width, height = SIZES[name]
        noise = np.random.default_rng(len(name)).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)


def write_text(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def coco(folder: Path) -> None:
    write_pictures(folder / "images")
    data = {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 64, "height": 48},
            {"id": 2, "file_name": "b.jpg", "width": 80, "height": 60},
            {"id": 3, "file_name": "empty.png", "width": 40, "height": 40},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 12, 20, 16], "area": 320, "iscrowd": 0},
            {
                "id": 2,
                "image_id": 1,
                "category_id": 9,
                "bbox": [30, 5, 20, 20],
                "segmentation": [TRIANGLE],
                "area": 200,
                "iscrowd": 0,
            },
            {"id": 3, "image_id": 2, "category_id": 7, "bbox": [8, 6, 40, 30], "area": 1200, "iscrowd": 0},
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
    }
    write_text(folder / "annotations.json", json.dumps(data))


def yolo(folder: Path) -> None:
    """With one split, as Ultralytics and CVAT write it."""
    write_pictures(folder / "images" / "train")
    labels = folder / "labels" / "train"
    # class, then centre and size, or a polygon, as shares of the picture's sides
    write_text(
        labels / "a.txt",
        "0 0.3125 0.4166667 0.3125 0.3333333\n1 0.46875 0.1041667 0.78125 0.1041667 0.78125 0.5208333\n",
    )
    write_text(labels / "b.txt", "0 0.35 0.35 0.5 0.5\n")
    write_text(folder / "data.yaml", "path: .\ntrain: images/train\nnames:\n  0: cat\n  1: dog\n")


def label_studio_yolo(folder: Path) -> None:
    """Label Studio's YOLO export has no data.yaml but classes.txt."""
    write_pictures(folder / "images")
    write_text(folder / "classes.txt", "cat\ndog\n")
    write_text(folder / "notes.json", '{"categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]}')
    write_text(folder / "labels" / "a.txt", "0 0.3125 0.4166667 0.3125 0.3333333\n1 0.625 0.3125 0.3125 0.4166667")
    write_text(folder / "labels" / "b.txt", "0 0.35 0.35 0.5 0.5")
    write_text(folder / "labels" / "empty.txt", "")


def voc_xml(name: str, folder: str = "JPEGImages") -> str:
    width, height = SIZES[name]
    objects = "".join(
        f"<object><name>{label}</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult><bndbox>"
        f"<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
        for label, (x, y, w, h) in BOXES[name]
    )
    return (
        f"<annotation><folder>{folder}</folder><filename>{name}</filename><size><width>{width}</width>"
        f"<height>{height}</height><depth>3</depth></size><segmented>0</segmented>{objects}</annotation>"
    )


def voc(folder: Path) -> None:
    write_pictures(folder / "JPEGImages")
    for name in SIZES:
        write_text(folder / "Annotations" / f"{Path(name).stem}.xml", voc_xml(name))


def labelme(folder: Path) -> None:
    write_pictures(folder)
    shapes = {
        "a.png": [
            {"label": "cat", "points": [[30, 28], [10, 12]], "group_id": None, "shape_type": "rectangle", "flags": {}},
            {
                "label": "dog",
                "points": [[30, 5], [50, 5], [50, 25]],
                "group_id": None,
                "shape_type": "polygon",
                "flags": {},
            },
        ],
        "b.jpg": [{"label": "cat", "points": [[8, 6], [48, 36]], "shape_type": "rectangle"}],
    }
    for name, found in shapes.items():
        width, height = SIZES[name]
        data = {
            "version": "5.5.0",
            "flags": {},
            "shapes": found,
            "imagePath": name,
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }
        write_text(folder / f"{Path(name).stem}.json", json.dumps(data))


def cvat(folder: Path) -> None:
    write_pictures(folder / "images")
    write_text(
        folder / "annotations.xml",
        """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta><task><name>pets</name><labels>
    <label><name>cat</name><color>#ff0000</color><attributes></attributes></label>
    <label><name>dog</name><color>#00ff00</color><attributes></attributes></label>
  </labels></task></meta>
  <image id="0" name="a.png" width="64" height="48">
    <box label="cat" source="manual" occluded="0" xtl="10.00" ytl="12.00" xbr="30.00" ybr="28.00" z_order="0"></box>
    <polygon label="dog" source="manual" occluded="0" points="30.00,5.00;50.00,5.00;50.00,25.00" z_order="0"></polygon>
  </image>
  <image id="1" name="b.jpg" width="80" height="60">
    <box label="cat" source="manual" occluded="0" xtl="8.00" ytl="6.00" xbr="48.00" ybr="36.00" z_order="0"></box>
  </image>
  <image id="2" name="empty.png" width="40" height="40"></image>
</annotations>
""",
    )


def label_studio(folder: Path) -> None:
    """Its JSON: places in percent, and pictures under the names that it gave them when they were uploaded."""
    write_pictures(folder / "images")
    box = {"type": "rectanglelabels", "from_name": "label", "to_name": "image"}
    polygon = {"type": "polygonlabels", "from_name": "label", "to_name": "image"}
    size_a, size_b = {"original_width": 64, "original_height": 48}, {"original_width": 80, "original_height": 60}
    a = [
        {
            **box,
            **size_a,
            "value": {
                "x": 15.625,
                "y": 25,
                "width": 31.25,
                "height": 100 / 3,
                "rotation": 0,
                "rectanglelabels": ["cat"],
            },
        },
        {
            **polygon,
            **size_a,
            "value": {"points": [[46.875, 125 / 12], [78.125, 125 / 12], [78.125, 625 / 12]], "polygonlabels": ["dog"]},
        },
    ]
    b = [{**box, **size_b, "value": {"x": 10, "y": 10, "width": 50, "height": 50, "rectanglelabels": ["cat"]}}]
    tasks = [
        {
            "id": i,
            "annotations": [{"id": i, "was_cancelled": False, "result": result}],
            "data": {"image": f"/data/upload/1/0a1b2c3d-{name}"},
        }
        for i, (name, result) in enumerate((("a.png", a), ("b.jpg", b), ("empty.png", [])), 1)
    ]
    write_text(folder / "project-1.json", json.dumps(tasks))


def roboflow_coco(folder: Path) -> None:
    """A split in folders, and a root category that no box has."""
    categories = [
        {"id": 0, "name": "pets", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "pets"},
        {"id": 2, "name": "dog", "supercategory": "pets"},
    ]
    ids = {"cat": 1, "dog": 2}
    for split, names in (("train", ["a.png", "empty.png"]), ("valid", ["b.jpg"])):
        write_pictures(folder / split, names)
        data = {
            "info": {"description": "Exported from roboflow.com"},
            "images": [
                {"id": i, "license": 1, "file_name": name, "width": SIZES[name][0], "height": SIZES[name][1]}
                for i, name in enumerate(names)
            ],
            "annotations": [],
            "categories": categories,
        }
        for i, name in enumerate(names):
            for label, box in BOXES[name]:
                data["annotations"].append(
                    {
                        "id": len(data["annotations"]),
                        "image_id": i,
                        "category_id": ids[label],
                        "bbox": box,
                        "area": 200 if label == "dog" else box[2] * box[3],
                        "segmentation": [TRIANGLE] if label == "dog" else [],
                        "iscrowd": 0,
                    }
                )
        write_text(folder / split / "_annotations.coco.json", json.dumps(data))


def roboflow_yolo(folder: Path) -> None:
    """Its data.yaml names folders beside the export's own, which are meant to be inside."""
    write_text(
        folder / "data.yaml",
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['cat', 'dog']\n\n"
        "roboflow:\n  workspace: me\n  project: pets\n  version: 1\n",
    )
    write_pictures(folder / "train" / "images", ["a.png", "empty.png"])
    write_pictures(folder / "valid" / "images", ["b.jpg"])
    write_text(
        folder / "train" / "labels" / "a.txt",
        "0 0.3125 0.4166667 0.3125 0.3333333\n1 0.46875 0.1041667 0.78125 0.1041667 0.78125 0.5208333",
    )
    write_text(folder / "train" / "labels" / "empty.txt", "")
    write_text(folder / "valid" / "labels" / "b.txt", "0 0.35 0.35 0.5 0.5")


def roboflow_voc(folder: Path) -> None:
    for split, names in (("train", ["a.png", "empty.png"]), ("valid", ["b.jpg"])):
        write_pictures(folder / split, names)
        for name in names:
            write_text(folder / split / f"{Path(name).stem}.xml", voc_xml(name, ""))


def csv_rows(names=tuple(SIZES), with_size: bool = False) -> str:
    """DeepForest's columns, or with the size of pictures Roboflow's and TensorFlow's."""
    header = "filename,width,height,class,xmin,ymin,xmax,ymax" if with_size else "image_path,xmin,ymin,xmax,ymax,label"
    lines = [header]
    for name in names:
        for label, (x, y, w, h) in BOXES[name] or [("", (0, 0, 0, 0))]:
            edges = f"{x},{y},{x + w},{y + h}" if label else ",,,"
            lines.append(
                f"{name},{SIZES[name][0]},{SIZES[name][1]},{label},{edges}" if with_size else f"{name},{edges},{label}"
            )
    return "\n".join(lines) + "\n"


def deepforest_csv(folder: Path) -> None:
    write_pictures(folder)
    write_text(folder / "boxes.csv", csv_rows())


def keras_retinanet_csv(folder: Path) -> None:
    """Without a header, and with classes in a file of their own."""
    write_pictures(folder / "images")
    write_text(folder / "boxes.csv", csv_rows().partition("\n")[2].replace("a.png", "images/a.png"))
    write_text(folder / "classes.csv", "cat,0\ndog,1\n")


def roboflow_csv(folder: Path) -> None:
    for split, names in (("train", ["a.png", "empty.png"]), ("valid", ["b.jpg"])):
        write_pictures(folder / split, names)
        write_text(folder / split / "_annotations.csv", csv_rows(names, with_size=True))


WRITERS = {
    x.__name__: x
    for x in (
        coco,
        yolo,
        label_studio_yolo,
        voc,
        labelme,
        cvat,
        label_studio,
        roboflow_coco,
        roboflow_yolo,
        roboflow_voc,
        deepforest_csv,
        keras_retinanet_csv,
        roboflow_csv,
    )
}


def yolo_squares(folder, number=12):
    """Pictures with one or two bright squares each, in two folders."""
    rng = np.random.default_rng(0)
    for i in range(number):
        part = f"camera{i % 3}"
        pixels = rng.integers(0, 60, (48, 64, 3), dtype=np.uint8)
        lines = []
        for label in range(1 + i % 2):
            x, y, side = rng.integers(0, 40), rng.integers(0, 24), rng.integers(8, 24)
            pixels[y : y + side, x : x + side] = (250, 250 * label, 90)
            lines.append(f"{label} {(x + side / 2) / 64} {(y + side / 2) / 48} {side / 64} {side / 48}")
        (folder / "images" / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "images" / part / f"{i}.png")
        write_text(folder / "labels" / part / f"{i}.txt", "\n".join(lines))
    write_text(folder / "data.yaml", "names: [square, disc]\n")
