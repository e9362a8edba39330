import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codetr_d2.data.formats import read_export
from codetr_d2.errors import InputError
from tests.data.formats import exports

CSV = {"deepforest_csv", "keras_retinanet_csv", "roboflow_csv"}
WITHOUT_POLYGONS = {"voc", "roboflow_voc", "label_studio_yolo"} | CSV
SPLIT = {"roboflow_coco", "roboflow_yolo", "roboflow_voc", "roboflow_csv"}


def objects(export):
    """By the name of each picture, its objects as (class, box), and the polygons of them all."""
    names = {x["id"]: x["name"] for x in export.coco["categories"]}
    files = {x["id"]: Path(x["file_name"]).name for x in export.coco["images"]}
    found = {name: [] for name in files.values()}
    for x in export.coco["annotations"]:
        found[files[x["image_id"]]].append((names[x["category_id"]], x["bbox"], x.get("segmentation")))
    return found


@pytest.mark.parametrize("name", exports.WRITERS)
def test_all_formats_give_the_same(name, tmp_path):
    exports.WRITERS[name](tmp_path)
    export = read_export(tmp_path)
    found = objects(export)
    assert found.keys() == exports.BOXES.keys()
    for picture, expected in exports.BOXES.items():
        assert [x[0] for x in found[picture]] == [x[0] for x in expected]
        for (_, box, polygons), (label, expected_box) in zip(found[picture], expected):
            assert box == pytest.approx(expected_box, abs=0.01)
            if label == "dog" and name not in WITHOUT_POLYGONS:
                assert np.allclose(polygons, [exports.TRIANGLE], atol=0.01)
            else:
                assert polygons is None
    assert [x["name"] for x in export.coco["categories"]] == ["cat", "dog"]
    areas = {x["area"] for x in export.coco["annotations"]}
    assert {round(x) for x in areas} == {320, 1200, 400 if name in WITHOUT_POLYGONS else 200}
    sizes = {Path(x["file_name"]).name: (x["width"], x["height"]) for x in export.coco["images"]}
    assert sizes == exports.SIZES
    splits = {Path(x["file_name"]).name: x["split"] for x in export.coco["images"]}
    if name in SPLIT:
        assert splits == {"a.png": "train", "b.jpg": "val", "empty.png": "train"}
    else:
        assert set(splits.values()) == {"train" if name == "yolo" else ""}
    assert export.problems == []


def test_another_library_writes_what_is_read(tmp_path):
    """globox's writers, of random boxes: nothing of ours is on that side."""
    globox = pytest.importorskip("globox")
    rng = np.random.default_rng(0)
    annotations, expected = globox.AnnotationSet(), {}
    (tmp_path / "images").mkdir()
    for i in range(4):
        size = (int(rng.integers(40, 200)), int(rng.integers(40, 200)))
        name = f"picture {i}.png"
        Image.new("RGB", size).save(tmp_path / "images" / name)
        corner = rng.integers(0, 20, (5, 2))
        boxes = np.concatenate([corner, rng.integers(1, 20, (5, 2))], axis=1).tolist()
        labels = [f"class {x}" for x in rng.integers(0, 3, 5)]
        format = globox.BoxFormat.LTWH
        annotations.add(
            globox.Annotation(
                name,
                size,
                [globox.BoundingBox.create(label=x, coords=b, box_format=format) for x, b in zip(labels, boxes)],
            )
        )
        expected[name] = sorted(zip(labels, boxes))
    labels = sorted({x for found in expected.values() for x, _ in found})
    annotations.save_pascal_voc(tmp_path / "voc")
    annotations.save_labelme(tmp_path / "labelme")
    (tmp_path / "cvat").mkdir()
    annotations.save_cvat(tmp_path / "cvat" / "annotations.xml")
    (tmp_path / "coco").mkdir()
    annotations.save_coco(tmp_path / "coco" / "annotations.json", auto_ids=True)
    annotations.save_yolo_v5(tmp_path / "yolo", label_to_id={x: i for i, x in enumerate(labels)})
    (tmp_path / "yolo" / "classes.txt").write_text("\n".join(labels))
    for file in (tmp_path / "images").iterdir():  # YOLO's own place
        (tmp_path / "yolo" / file.name).write_bytes(file.read_bytes())
    for name in ("voc", "labelme", "cvat", "coco", "yolo"):
        found = objects(read_export(tmp_path / name, tmp_path / ("yolo" if name == "yolo" else "images")))
        for picture, objects_there in expected.items():
            got = sorted((label, box) for label, box, _ in found[picture])
            assert [x[0] for x in got] == [x[0] for x in objects_there], name
            assert np.allclose([x[1] for x in got], [x[1] for x in objects_there], atol=0.01), name


def one_picture(folder, size=(100, 80), name="a.png"):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(folder / name)


def yolo_lines(folder, text, more=""):
    one_picture(folder / "images")
    exports.write_text(folder / "labels" / "a.txt", text)
    exports.write_text(folder / "data.yaml", f"train: images\nnames: [x, y]\n{more}")
    return read_export(folder)


def test_lines_of_yolo(tmp_path):
    """A score behind the box, a class written as a float, an empty line; lines that are none of it are named."""
    export = yolo_lines(tmp_path, "1.0 0.5 0.5 0.2 0.5 0.9\n\n0 0.1 0.2 0.3\n7 0.5 0.5 0.1 0.1\n0 a b c d\n")
    assert objects(export)["a.png"] == [("y", [40, 20, 20, 40], None)]
    assert [re.search(r"a\.txt:(\d)", x.detail)[1] for x in export.problems] == ["3", "4", "5"]
    assert {x.kind for x in export.problems} == {"unreadable annotation file"}


def test_key_points_are_no_polygon(tmp_path):
    export = yolo_lines(tmp_path, "0 0.5 0.5 0.2 0.5 0.1 0.1 2 0.2 0.2 2", "kpt_shape: [2, 3]")
    assert objects(export)["a.png"] == [("x", [40, 20, 20, 40], None)]


def test_lists_of_yolo(tmp_path):
    """data.yaml may name text files that list pictures."""
    one_picture(tmp_path / "images")
    one_picture(tmp_path / "images", name="b.png")
    exports.write_text(tmp_path / "data.yaml", "train: train.txt\nval: val.txt\nnames: {0: x}\n")
    exports.write_text(tmp_path / "train.txt", "./images/a.png\n")
    exports.write_text(tmp_path / "val.txt", "images/b.png\n")
    splits = {Path(x["file_name"]).name: x["split"] for x in read_export(tmp_path).coco["images"]}
    assert splits == {"a.png": "train", "b.png": "val"}


def test_lists_of_another_root(tmp_path):
    """As CVAT writes them."""
    one_picture(tmp_path / "images" / "train")
    exports.write_text(tmp_path / "labels" / "train" / "a.txt", "0 0.5 0.5 0.2 0.5")
    exports.write_text(tmp_path / "data.yaml", "path: .\ntrain: train.txt\nnames: {0: x}\n")
    exports.write_text(tmp_path / "train.txt", "data/images/train/a.png\n")
    assert objects(read_export(tmp_path))["a.png"] == [("x", [40, 20, 20, 40], None)]


def test_darknet(tmp_path):
    """Labels beside the pictures, classes in obj.names, splits by folder."""
    for split in ("train", "valid"):
        one_picture(tmp_path / f"obj_{split}_data", name=f"{split}.png")
        exports.write_text(tmp_path / f"obj_{split}_data" / f"{split}.txt", "1 0.5 0.5 0.2 0.5")
    exports.write_text(tmp_path / "obj.names", "x\ny\n")
    exports.write_text(tmp_path / "obj.data", "classes = 2\nnames = data/obj.names\n")
    export = read_export(tmp_path)
    assert objects(export) == {f"{x}.png": [("y", [40, 20, 20, 40], None)] for x in ("train", "valid")}
    assert {x["split"] for x in export.coco["images"]} == {"train", "val"}


def test_other_annotations_of_the_same_pictures(tmp_path):
    """As beside COCO's own: persons with key points are objects of the other file already."""
    exports.coco(tmp_path)
    for name in ("instances_train2017", "person_keypoints_train2017", "captions_train2017"):
        exports.write_text(tmp_path / "annotations" / f"{name}.json", (tmp_path / "annotations.json").read_text())
    (tmp_path / "annotations.json").unlink()
    export = read_export(tmp_path)
    assert len(export.coco["annotations"]) == 3 and {x["split"] for x in export.coco["images"]} == {"train"}
    (tmp_path / "annotations" / "instances_train2017.json").rename(tmp_path / "annotations" / "boxes.json")
    assert len(read_export(tmp_path).coco["annotations"]) == 3


def test_yolo_of_missing_folders(tmp_path):
    exports.write_text(tmp_path / "data.yaml", "path: /nowhere/pets\ntrain: images/train\nnames: [x]\n")
    with pytest.raises(InputError, match=r"data\.yaml: its train name no folder with pictures"):
        read_export(tmp_path)


@pytest.mark.parametrize("database", ["The VOC2007 Database", "roboflow.ai"])
def test_files_that_count_from_1(database, tmp_path):
    one_picture(tmp_path, (64, 48))
    text = exports.voc_xml("a.png").replace("<folder>", f"<source><database>{database}</database></source><folder>")
    exports.write_text(tmp_path / "a.xml", text)
    assert objects(read_export(tmp_path))["a.png"][0][1] == [9, 11, 21, 17]


def test_lists_of_pascal(tmp_path):
    exports.voc(tmp_path)
    exports.write_text(tmp_path / "ImageSets" / "Main" / "train.txt", "a\nempty\n")
    exports.write_text(tmp_path / "ImageSets" / "Main" / "val.txt", "b\n")
    exports.write_text(tmp_path / "ImageSets" / "Main" / "trainval.txt", "a\nb\nempty\n")
    splits = {Path(x["file_name"]).name: x["split"] for x in read_export(tmp_path).coco["images"]}
    assert splits == {"a.png": "train", "b.jpg": "val", "empty.png": "train"}


def labelme_shapes(folder, *shapes):
    one_picture(folder)
    data = {"shapes": shapes, "imagePath": "..\\photos\\a.png", "imageHeight": 80, "imageWidth": 100}
    exports.write_text(folder / "a.json", json.dumps(data))
    return read_export(folder)


def test_shapes_of_labelme(tmp_path):
    """Polygons of a group are one object, a circle is its square, a line nothing; the picture's path is of Windows."""
    export = labelme_shapes(
        tmp_path,
        {"label": "x", "points": [[0, 0], [10, 0], [10, 10]], "shape_type": "polygon", "group_id": 1},
        {"label": "x", "points": [[20, 20], [30, 20], [30, 30]], "shape_type": "polygon", "group_id": 1},
        {"label": "y", "points": [[50, 50], [53, 54]], "shape_type": "circle", "group_id": None},
        {"label": "y", "points": [[1, 1], [2, 2]], "shape_type": "line"},
    )
    (_, box, polygons), (_, circle, no_polygon) = objects(export)["a.png"]
    assert box == [0, 0, 30, 30] and polygons == [[0, 0, 10, 0, 10, 10], [20, 20, 30, 20, 30, 30]]
    assert circle == [45, 45, 10, 10] and no_polygon is None
    assert [(x.kind, x.detail) for x in export.problems] == [("shape that is no object", "line y")]


def cvat_shapes(folder, shapes):
    one_picture(folder)
    exports.write_text(
        folder / "annotations.xml",
        "<annotations><meta><job><labels><label><name>x</name></label></labels></job></meta>"
        f'<image id="0" name="frames/a.png" width="100" height="80" subset="Validation">{shapes}</image></annotations>',
    )
    return read_export(folder)


def test_shapes_of_cvat(tmp_path):
    """A box turned by a right angle, an ellipse, a point; the subset is the split."""
    export = cvat_shapes(
        tmp_path,
        '<box label="x" xtl="40" ytl="30" xbr="60" ybr="40" rotation="90.0"/>'
        '<ellipse label="x" cx="50" cy="40" rx="10" ry="5"/><points label="x" points="1,1"/><tag label="x"/>',
    )
    assert [x[1] for x in objects(export)["a.png"]] == [[45, 25, 10, 20], [40, 35, 20, 10]]
    assert [x.kind for x in export.problems] == ["shape that is no object"]
    assert export.coco["images"][0]["split"] == "val"


def test_cvat_of_a_video(tmp_path):
    exports.write_text(tmp_path / "annotations.xml", "<annotations><track/></annotations>")
    with pytest.raises(InputError, match="is of a video"):
        read_export(tmp_path)


def test_tasks_of_label_studio(tmp_path):
    """A local file, a cancelled annotation, a task that nobody has done, a turned rectangle, a brush stroke."""
    one_picture(tmp_path / "photos")
    turned = {"x": 50, "y": 50, "width": 10, "height": 25, "rotation": 90, "rectanglelabels": ["x"]}
    size = {"original_width": 100, "original_height": 80}
    results = [
        {"type": "rectanglelabels", "value": turned, **size},
        {"type": "brushlabels", "value": {"brushlabels": ["x"]}, **size},
        {"type": "choices", "value": {"choices": ["sharp"]}},
    ]
    tasks = [
        {
            "id": 1,
            "annotations": [{"was_cancelled": True, "result": []}, {"result": results}],
            "data": {"text": "hello", "image": "/data/local-files/?d=my%20files/photos/a.png"},
        },
        {"id": 2, "annotations": [], "data": {"image": "b.png"}},
    ]
    exports.write_text(tmp_path / "tasks.json", json.dumps(tasks))
    export = read_export(tmp_path)
    [(_, box, _)] = objects(export)["a.png"]
    assert box == pytest.approx([30, 40, 20, 10])  # 10 x 20 pixels, turned around (50, 40) to the left
    assert [x.kind for x in export.problems] == ["shape that is no object", "task without annotations"]


def test_label_studio_in_its_short_form(tmp_path):
    one_picture(tmp_path)
    region = {"x": 10, "y": 10, "width": 20, "height": 50, "rotation": 0, "rectanglelabels": ["x"]}
    size = {"original_width": 100, "original_height": 80}
    tasks = [{"id": 1, "image": "/data/upload/1/0a1b2c3d-a.png", "label": [region | size], "annotator": 1}]
    exports.write_text(tmp_path / "tasks.json", json.dumps(tasks))
    assert objects(read_export(tmp_path))["a.png"] == [("x", [10, 8, 20, 40], None)]


def csv_file(folder, text, name="boxes.csv", pictures=("a.png",)):
    for picture in pictures:
        one_picture(folder, name=picture)
    exports.write_text(folder / name, text)
    return folder


def test_columns_of_a_csv(tmp_path):
    """Any order and case, further columns, quotes, semicolons, a byte order mark, line ends and paths of Windows."""
    text = '\ufeff;Label;YMAX;xmax;ymin;XMIN;score;Image_Path\r\n0;"a;b";40;30;20;10.5;;"C:\\photos\\a.png"\r\n\r\n'
    export = read_export(csv_file(tmp_path, text))
    assert objects(export) == {"a.png": [("a;b", [10.5, 20, 19.5, 20], None)]} and export.problems == []


def test_pictures_without_objects_in_a_csv(tmp_path):
    """keras-retinanet leaves the cells empty, DeepForest writes zeros; no line says nothing."""
    text = "image_path,xmin,ymin,xmax,ymax,label\na.png,,,,,\nb.png,0,0,0,0,Tree\n"
    export = read_export(csv_file(tmp_path, text, pictures=("a.png", "b.png", "c.png")))
    assert objects(export) == {"a.png": [], "b.png": []} and export.problems == []


def test_splits_of_csv_files(tmp_path):
    header = "image_path,xmin,ymin,xmax,ymax,label\n"
    for split, name in (("train", "a.png"), ("val", "b.png"), ("test", "c.png")):
        csv_file(tmp_path, f"{header}{name},1,2,3,4,x\n", f"trees_{split}.csv", [name])
    splits = {Path(x["file_name"]).name: x["split"] for x in read_export(tmp_path).coco["images"]}
    assert splits == {"a.png": "train", "b.png": "val", "c.png": "test"}
    assert len(read_export(tmp_path / "trees_val.csv").coco["images"]) == 1


def test_lines_of_a_csv(tmp_path):
    """What is wrong with a line is told with its number; the others are used. A missing picture is told once."""
    lines = [
        "image_path,xmin,ymin,xmax,ymax,label",
        "a.png,1,2,31,42,x",
        "a.png,one,2,3,4,x",
        "a.png,1,2",
        "a.png,1,2,3,4,",
    ]
    lines += ["b.png,1,2,3,4,x", "b.png,5,6,7,8,x", "a.png,1,2,,4,x", "a.png,5,6,25,46,y"]
    export = read_export(csv_file(tmp_path, "\n".join(lines)))
    assert objects(export) == {"a.png": [("x", [1, 2, 30, 40], None), ("y", [5, 6, 20, 40], None)]}
    expected = [
        (3, "could not convert string to float: 'one'"),
        (4, "3 cells are too few"),
        (5, "the class is empty"),
        (6, "there is no such picture"),
        (8, "could not convert string to float: ''"),
    ]
    assert len(export.problems) == len(expected)
    for problem, (line, text) in zip(export.problems, expected):
        assert f"boxes.csv:{line}:" in problem.detail and problem.detail.endswith(text)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "image_path,xmin,ymin,xmax,label\na.png,1,2,3,x",
            r"boxes.csv:1 has no column of the ymax. .* label \(or class\)",
        ),
        ("xmin,ymin,xmax,ymax\n1,2,3,4", "boxes.csv:1 has no column of the picture, class. .*image_path"),
        ("filename,class\na.png,x", "no annotations of a known format.*CSV with the columns image_path"),
        ("a.png,10,20,5,5,x", "no annotations of a known format"),  # corner and size?
        ("10,20,30,40,x,a.png", "no annotations of a known format"),
        ("filename,xmin,ymin,xmax,ymax,class\na.png,0.1,0.2,0.3,0.4,x", "Write them in pixels"),
        ('filename,xmin,ymin,xmax,ymax,class\na.png,"' + "1" * 200_000, "boxes.csv:2 is not readable CSV"),
        ("filename,xmin,ymin,xmax,ymax,class\n", "no picture of this CSV export"),
    ],
)
def test_no_csv_of_boxes(text, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_export(csv_file(tmp_path, text))


def test_a_csv_of_another_encoding(tmp_path):
    csv_file(tmp_path, "")
    (tmp_path / "boxes.csv").write_bytes("filename,xmin,ymin,xmax,ymax,class\na.png,1,2,3,4,Bäume".encode("latin-1"))
    with pytest.raises(InputError, match="boxes.csv is not what a file of the format csv should be .'utf-8' codec"):
        read_export(tmp_path)


def test_what_cannot_be_read_is_told(tmp_path):
    """One picture of each kind of damage, and the rest is used."""
    exports.coco(tmp_path)
    (tmp_path / "images" / "b.jpg").write_bytes(b"no picture")
    (tmp_path / "images" / "empty.png").unlink()
    file = tmp_path / "annotations.json"
    data = json.loads(file.read_text())
    data["annotations"][0]["bbox"] = [1, 2, float("nan"), 4]
    data["annotations"].append({"id": 9, "image_id": 77, "category_id": 7, "bbox": [0, 0, 1, 1]})
    data["annotations"].append({"id": 10, "image_id": 1, "category_id": 7})
    file.write_text(json.dumps(data))
    export = read_export(tmp_path)
    assert [x[0] for x in objects(export)["a.png"]] == ["dog"]
    assert sorted(x.kind for x in export.problems) == [
        "annotation of no picture or class",
        "box of no place",
        "missing picture",
        "unreadable annotation file",
        "unreadable picture",
    ]


def test_another_size_than_annotated(tmp_path):
    exports.cvat(tmp_path)
    Image.new("RGB", (32, 24)).save(tmp_path / "images" / "a.png")
    [problem] = read_export(tmp_path).problems
    assert problem.kind == "unreadable picture" and "annotation says 64 x 48" in problem.detail


def test_pictures_elsewhere(tmp_path):
    exports.cvat(tmp_path / "a")
    (tmp_path / "a" / "images").rename(tmp_path / "photos")
    with pytest.raises(InputError, match="no picture of this CVAT export.*--images"):
        read_export(tmp_path / "a")
    assert len(read_export(tmp_path / "a", tmp_path / "photos").coco["images"]) == 3


def test_pictures_of_the_same_name(tmp_path):
    """The folder of the annotation file, or the path in it, tells them apart."""
    for part in ("one", "two"):
        exports.labelme(tmp_path / part)
        exports.write_pictures(tmp_path / part / "copies")
    data = json.loads((tmp_path / "two" / "a.json").read_text())
    exports.write_text(tmp_path / "two" / "a.json", json.dumps(data | {"imagePath": "C:\\work\\copies\\a.png"}))
    export = read_export(tmp_path)
    annotated = {x["image_id"] for x in export.coco["annotations"]}
    files = {str(Path(x["file_name"]).relative_to(tmp_path)) for x in export.coco["images"] if x["id"] in annotated}
    assert files == {"one/a.png", "one/b.jpg", "two/copies/a.png", "two/b.jpg"}


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "holds no annotations of a known format"),
        (lambda folder: exports.write_text(folder / "a.json", '{"x": 1}'), "holds no annotations of a known format"),
        (lambda folder: exports.write_text(folder / "a.json", '{"images": ['), "is not readable JSON"),
        (lambda folder: exports.write_text(folder / "a.xml", "<annotations><image>"), "is not readable XML"),
        (
            lambda folder: exports.write_text(folder / "data.yaml", "names: {cat: 0}"),
            "data.yaml is not what .* should be",
        ),
        (
            lambda folder: exports.write_text(
                folder / "a.json", '{"images": [{}], "annotations": [], "categories": [{"id": 1, "name": "x"}]}'
            ),
            "a.json is not what a file of the format coco should be .no 'file_name'.",
        ),
    ],
)
def test_nothing_to_read(prepare, message, tmp_path):
    prepare(tmp_path / "export")
    with pytest.raises(InputError, match=message):
        read_export(tmp_path / "export")


def test_an_archive(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        archive.writestr("a.txt", "")
    with pytest.raises(InputError, match="is a zip archive. Unpack it"):
        read_export(tmp_path / "export.zip")


def test_the_format_that_is_asked_for(tmp_path):
    exports.coco(tmp_path)
    for name in ("a.png", "b.jpg"):
        exports.write_text(tmp_path / f"{Path(name).stem}.xml", exports.voc_xml(name))
    assert read_export(tmp_path).format == "COCO"
    assert read_export(tmp_path, format="voc").format == "Pascal VOC"
    with pytest.raises(InputError, match="nothing of the format yolo"):
        read_export(tmp_path, format="yolo")
