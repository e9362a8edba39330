"""COCO's numbers, against pycocotools."""

import contextlib
import copy
import io
import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from codetr_d2.data.datasets import AnnotationFile, annotated_images
from codetr_d2.errors import InputError
from codetr_d2.evaluation import DetectionEvaluator, average_precisions, evaluation_style

HEIGHT, WIDTH = 240, 320


def ellipse(x, y, w, h):
    t = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    return np.stack((x + w / 2 + w / 2 * np.cos(t), y + h / 2 + h / 2 * np.sin(t)), axis=1).ravel().round(2).tolist()


def make_case(seed: int, num_images=12, num_detections=140):
    """A data set of five categories, with crowds and gaps in the ids, and detections near and far from its objects."""
    rng = np.random.default_rng(seed)
    ids = [3, 4, 9, 40, 77]  # 77 has no object
    images = [{"id": 10 * i + 5, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(num_images)]
    annotations, detections = [], []
    for image in images[:-1]:  # the last one is empty
        boxes = []
        for _ in range(rng.integers(1, 9)):
            w, h = rng.choice([12, 50, 130], 2) + rng.integers(0, 20, 2)
            box = [int(rng.integers(0, WIDTH - w)), int(rng.integers(0, HEIGHT - h)), int(w), int(h)]
            entry = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": int(rng.choice(ids[:4]))}
            crowd = int(rng.random() < 0.15)
            segmentation = [ellipse(*box)]
            if crowd:
                rle = mask_util.merge(mask_util.frPyObjects(segmentation, HEIGHT, WIDTH))
                segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
            entry.update(bbox=box, iscrowd=crowd, segmentation=segmentation, area=float(w * h) * 0.78)
            annotations.append(entry)
            boxes.append((entry["category_id"], box))
        for _ in range(num_detections):
            category, box = boxes[rng.integers(len(boxes))]
            if rng.random() < 0.2:
                category = int(rng.choice(ids))
            box = [float(x) for x in np.array(box) + rng.integers(-9, 10, 4).clip([-9, -9, 1 - box[2], 1 - box[3]])]
            mask = mask_util.merge(mask_util.frPyObjects([ellipse(*box)], HEIGHT, WIDTH))
            mask = {"size": mask["size"], "counts": mask["counts"].decode()}
            result = {
                "image_id": image["id"],
                "category_id": category,
                "bbox": box,
                "score": float(rng.integers(1, 99)) / 99,
            }
            detections.append({**result, "segmentation": mask})
    categories = [{"id": i, "name": f"class{i}"} for i in ids]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}, detections


@pytest.fixture
def dataset(tmp_path):
    """Write and register a data set in COCO's format; return its name."""

    def make(data):
        name = f"evaluated {tmp_path.name}"
        (tmp_path / "truth.json").write_text(json.dumps(data))
        for image in data["images"]:
            Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(tmp_path / image["file_name"])
        DatasetCatalog.register(name, AnnotationFile(name, str(tmp_path / "truth.json"), str(tmp_path)))
        MetadataCatalog.get(name).evaluator_type = "coco"
        return name

    return make


def pycocotools_ap(data, detections, task):
    """AP, AP50, AP75, APs, APm, APl and the AP of each category, as pycocotools has them, in percent."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(data)
        truth.createIndex()
        found = [
            {k: v for k, v in x.items() if k != ("bbox" if task == "segm" else "segmentation")} for x in detections
        ]
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(found)), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"]
    each = [precision[:, :, k, 0, 2] for k in range(precision.shape[2])]
    ap = {x["name"]: p[p > -1].mean() * 100 if (p > -1).any() else np.nan for x, p in zip(data["categories"], each)}
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    overall = {key: value * 100 if value > -1 else np.nan for key, value in zip(names, evaluation.stats[:6])}
    return {**overall, **{f"AP-{name}": value for name, value in ap.items()}}


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("seed, num_detections", [(0, 140), (1, 20), (2, 140), (3, 700)])
def test_numbers_are_those_of_pycocotools(dataset, task, seed, num_detections):
    """700 detections of an image are more than the 100 of a class that count."""
    data, detections = make_case(seed, num_detections=num_detections)
    expected = pycocotools_ap(data, detections, task)
    assert 2 < expected["AP"] < 98 and np.isnan(expected["AP-class77"])
    images = annotated_images(dataset(data))
    index_of = {x["id"]: i for i, x in enumerate(images.categories)}
    results = [{**x, "category_id": index_of[x["category_id"]]} for x in detections]
    assert average_precisions(images, results, task, "coco") == pytest.approx(expected, abs=1e-9, nan_ok=True)


def instances(detections, index_of):
    boxes = torch.tensor([x["bbox"] for x in detections], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    found = Instances((HEIGHT, WIDTH), pred_boxes=Boxes(boxes), scores=torch.tensor([x["score"] for x in detections]))
    found.pred_classes = torch.tensor([index_of[x["category_id"]] for x in detections], dtype=torch.int64)
    return found


def test_the_evaluator_and_the_file_of_its_results(dataset, tmp_path):
    data, detections = make_case(1)
    name = dataset(data)
    evaluator = DetectionEvaluator(name, str(tmp_path / "out"))
    for image in data["images"]:
        own = [x for x in detections if x["image_id"] == image["id"]]
        found = instances(own, {3: 0, 4: 1, 9: 2, 40: 3, 77: 4})
        evaluator.process([{"image_id": image["id"]}], [{"instances": found}])
    results = evaluator.evaluate()
    assert list(results) == ["bbox"]
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert pycocotools_ap(data, written, "bbox") == pytest.approx(results["bbox"], abs=1e-9, nan_ok=True)
    assert [x["category_id"] for x in written] == [x["category_id"] for x in detections]
    evaluator.reset()
    assert evaluator.evaluate()["bbox"]["AP"] == 0  # there are objects, and none is found


def test_annotation_ids_and_image_ids_may_be_texts(dataset):
    data, detections = make_case(2)
    expected = pycocotools_ap(data, detections, "bbox")
    for x in data["images"]:
        x["id"] = f"image-{x['id']}"
    for x in data["annotations"]:
        x.update(id=f"uuid-{x['id']}", image_id=f"image-{x['image_id']}")
    images = annotated_images(dataset(data))
    index_of = {x["id"]: i for i, x in enumerate(images.categories)}
    results = [
        {**x, "image_id": f"image-{x['image_id']}", "category_id": index_of[x["category_id"]]} for x in detections
    ]
    assert average_precisions(images, results, "bbox", "coco") == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_a_test_set_without_annotations_is_written_for_submission(dataset, tmp_path, caplog):
    data, detections = make_case(3)
    del data["annotations"]
    evaluator = DetectionEvaluator(dataset(data), str(tmp_path / "out"))
    found = instances(detections[:2], {3: 0, 4: 1, 9: 2, 40: 3, 77: 4})
    evaluator.process([{"image_id": 5}], [{"instances": found}])
    with caplog.at_level("INFO", logger="codetr_d2"):
        assert evaluator.evaluate() == {}
    assert "has no annotations to evaluate with; its detections are in" in caplog.text
    assert len(json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())) == 2


def test_two_categories_of_one_name_have_lines_of_their_own(dataset):
    data, detections = make_case(0)
    data["categories"][1]["name"] = data["categories"][0]["name"]
    results = average_precisions(annotated_images(dataset(data)), [], "bbox", "coco")
    assert {"AP-class3 (id 3)", "AP-class3 (id 4)", "AP-class9"} <= set(results)


def test_an_evaluator_that_is_not_known():
    with pytest.raises(InputError, match="voc_2007_val asks for the evaluator 'pascal_voc'; there are: coco, lvis"):
        evaluation_style("voc_2007_val")
