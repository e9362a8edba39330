from collections import Counter

import cv2
import numpy as np
import pytest
from PIL import Image

from codetr_d2.data.checks_of_dataset import find_problems, picture_prints, similar_pictures


def dataset(boxes, splits=("train",), names=("cat", "dog"), size=(100, 80)):
    """Images of one size with (image, class, box) triples, counted from 0."""
    images = [{"id": i + 1, "file_name": f"{i}.png", "width": size[0], "height": size[1]} for i in range(len(splits))]
    annotations = [{"image_id": i + 1, "category_id": c + 1, "bbox": list(b), "iscrowd": 0} for i, c, b in boxes]
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}, list(splits)


def problems(*args, prints=None, **kwargs):
    coco, splits = dataset(*args, **kwargs)
    if prints is None:  # all unlike each other
        prints = np.random.default_rng(0).integers(0, 255, (len(splits), 16, 17, 3), dtype=np.uint8)
    return find_problems(coco, splits, prints)


BOTH = [(0, 0, (1, 1, 9, 9)), (0, 1, (30, 1, 9, 9))]  # so that neither class is missing


@pytest.mark.parametrize(
    "box, kind",
    [
        ((10, 10, 20, 20), None),
        ((-0.9, -0.5, 30, 30), None),
        ((80, 60, 20.9, 20.5), None),
        ((-1.5, 10, 20, 20), "box that sticks out of its picture"),
        ((90, 10, 12, 20), "box that sticks out of its picture"),
        ((10, 70, 12, 20), "box that sticks out of its picture"),
        ((100, 10, 20, 20), "box outside of its picture"),
        ((10, -30, 20, 30), "box outside of its picture"),
        ((10, 10, 0, 20), "box without area"),
        ((10, 10, 20, -3), "box without area"),
    ],
)
def test_boxes(box, kind):
    found = problems([*BOTH, (0, 1, box)])
    assert [x.kind for x in found] == ([kind] if kind else [])
    if kind:
        assert found[0].image_id == 1 and found[0].bbox == list(box) and found[0].detail.startswith("dog [")


def test_objects_twice():
    """IoU of 0.9025 and 0.81 by hand: 19 x 19 of 20 x 20, and 18 x 18."""
    inside, less = (10, 10, 19, 19), (40, 40, 18, 18)
    boxes = [(0, 0, (10, 10, 20, 20)), (0, 0, inside), (0, 0, (40, 40, 20, 20)), (0, 0, less), (0, 1, inside)]
    found = problems(boxes)
    assert Counter(x.kind for x in found) == {"object that is annotated twice": 1, "object of two classes": 2}
    assert found[0].detail == "cat, overlapping by 0.90" and found[0].bbox == list(inside)


def test_classes():
    boxes = [(0, 0, (1, 1, 9, 9)), (1, 0, (1, 1, 9, 9)), (0, 1, (30, 1, 9, 9)), (1, 2, (30, 1, 9, 9))]
    found = problems(boxes, ("train", "val"), ("cat", "only train", "only val", "none", "Cat "))
    assert [(x.kind, x.detail) for x in found] == [
        ("class that a split lacks", "only train is not evaluated: it is in train alone"),
        ("class that a split lacks", "only val is not trained on: it is in val alone"),
        ("class without an object", "none"),
        ("class without an object", "Cat "),
        ("classes that differ in their spelling alone", "'cat', 'Cat '"),
    ]
    assert [x.image_id for x in found[:2]] == [1, 2]


def pictures(folder):
    """A photograph-like picture in several versions, and others, as (name, pixels) pairs."""
    rng = np.random.default_rng(0)

    def scene():
        return cv2.resize(rng.integers(0, 255, (9, 12), dtype=np.uint8), (240, 180), interpolation=cv2.INTER_CUBIC)

    first = scene()
    versions = {
        "first": first,
        "smaller": cv2.resize(first, (120, 90), interpolation=cv2.INTER_AREA),
        "brighter": np.clip(first.astype(int) + 6, 0, 255).astype(np.uint8),
        "noisy": np.clip(first + rng.normal(0, 3, first.shape), 0, 255).astype(np.uint8),
        "flipped": first[:, ::-1],
        "moved": np.roll(first, 40, axis=1),
        "with an object": cv2.rectangle(first.copy(), (100, 80), (120, 100), 255, -1),
        "other": scene(),
        "another": scene(),
    }
    for name, pixels in versions.items():
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{name}.jpg", quality=60)
    return [
        {"id": i, "file_name": str(folder / f"{name}.jpg"), "width": x.shape[1], "height": x.shape[0]}
        for i, (name, x) in enumerate(versions.items(), 1)
    ]


def test_similar_pictures(tmp_path):
    prints, unreadable = picture_prints(pictures(tmp_path))
    assert unreadable == [] and prints.shape == (9, 16, 17, 3)
    assert similar_pictures(prints[:1], prints) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert similar_pictures(prints[4:], prints[4:]) == [(i, i) for i in range(5)]


def test_pictures_of_two_splits(tmp_path):
    prints = np.delete(picture_prints(pictures(tmp_path))[0], 6, axis=0)
    splits = ("train", "val", "train", "test", "train", "train", "val", "val")
    found = problems([(0, 0, (1, 1, 9, 9)), (1, 0, (1, 1, 9, 9))], splits, ("cat",), prints=prints)
    pairs = {(x.detail.split(" ")[0], x.detail.split(" ")[5]) for x in found}
    # (of val or test, of train or val): the smaller one against two of train, the noisy one against all three
    assert pairs == {("1.png", "0.png"), ("1.png", "2.png"), ("3.png", "0.png"), ("3.png", "2.png"), ("3.png", "1.png")}
    assert {x.kind for x in found} == {"picture of two splits"} and {x.image_id for x in found} == {2, 4}


def test_a_picture_that_breaks_off(tmp_path):
    images = pictures(tmp_path)[:2]
    content = (tmp_path / "first.jpg").read_bytes()
    (tmp_path / "first.jpg").write_bytes(content[: len(content) // 2])
    prints, [problem] = picture_prints(images)
    assert problem.image_id == 1 and problem.kind == "unreadable picture" and not prints[0].any() and prints[1].any()
