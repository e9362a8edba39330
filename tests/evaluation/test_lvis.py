"""Against the numbers of the ``lvis`` package 0.5.3, recorded once with numpy 1.23.5."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from codetr_d2.data.datasets import annotated_images
from codetr_d2.evaluation import DetectionEvaluator, average_precisions

HEIGHT, WIDTH = 192, 256
RECORDED = {
    "bbox": {
        **{"AP": 14.194106, "AP50": 19.493697, "AP75": 16.406153},
        **{"APs": 10.377798, "APm": 7.502418, "APl": 73.577191},
        **{"APr": 6.817267, "APc": 5.497442, "APf": 30.267608},
    },
    "segm": {
        **{"AP": 12.193339, "AP50": 19.387888, "AP75": 14.726066},
        **{"APs": 4.451933, "APm": 10.162847, "APl": 68.162816},
        **{"APr": 6.04363, "APc": 4.551328, "APf": 25.98506},
    },
}


def make_case():
    """A small data set in LVIS's format, and detections in COCO's: more than 300 in every image."""
    rng = np.random.RandomState(0)
    categories = [{"id": i + 1, "name": f"class{i}", "frequency": "rcf"[i % 3]} for i in range(12)]
    images, annotations, detections = [], [], []
    for image_id in range(1, 9):
        order = (rng.permutation(12) + 1).tolist()
        present, negative, unknown = order[:4], order[4:8], order[8:]
        images.append(
            {
                "id": image_id,
                "width": WIDTH,
                "height": HEIGHT,
                "coco_url": f"http://images.cocodataset.org/val2017/{image_id}.png",
                "neg_category_ids": negative,
                "not_exhaustive_category_ids": present[:2],
            }
        )
        found = []
        for category in present:
            for _ in range(rng.randint(1, 5)):
                size = np.array([12, 60, 180])[rng.randint(3)]
                box = [*rng.randint(0, 50, 2).tolist(), int(size), int(size * 3 // 4)]
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category})
                annotations[-1].update(bbox=box, segmentation=diamond(box), area=box[2] * box[3] / 2)
                shift = np.ceil(size / 24)
                moved = [np.array(box) + rng.randint(-shift, shift + 1, 4) for _ in range(rng.randint(1, 3))]
                found += [(category, x) for x in moved]
        for category in [*present, *negative, *unknown]:
            for _ in range(30):
                found.append((category, np.array([*rng.randint(0, 100, 2), *rng.randint(10, 80, 2)])))
        for category, box in found:
            score = rng.randint(1, 1024) / 1024
            detections.append({"image_id": image_id, "category_id": category, "bbox": box.tolist(), "score": score})
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}, detections


def diamond(box):
    x, y, w, h = box
    return [[x, y + h / 2, x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h]]


@pytest.fixture
def make_evaluator(tmp_path, request):
    def make(data):
        (tmp_path / "lvis.json").write_text(json.dumps(data))
        name = request.node.name
        DatasetCatalog.register(name, lambda: pytest.fail("this is detectron2's loader"))
        MetadataCatalog.get(name).set(
            json_file=str(tmp_path / "lvis.json"), image_root=str(tmp_path), evaluator_type="lvis"
        )
        evaluator = DetectionEvaluator(name, str(tmp_path / "out"))
        return evaluator

    return make


def test_numbers_are_those_of_lvis(make_evaluator, tmp_path):
    data, detections = make_case()
    evaluator = make_evaluator(data)
    for image in data["images"]:
        found = [x for x in detections if x["image_id"] == image["id"]]
        boxes = torch.tensor([x["bbox"] for x in found], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        masks = [mask_util.decode(mask_util.frPyObjects(diamond(x["bbox"]), HEIGHT, WIDTH))[..., 0] for x in found]
        instances = Instances((HEIGHT, WIDTH), pred_boxes=Boxes(boxes), pred_masks=torch.from_numpy(np.stack(masks)))
        instances.scores = torch.tensor([x["score"] for x in found])
        instances.pred_classes = torch.tensor([x["category_id"] - 1 for x in found])
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    results = evaluator.evaluate()
    assert results.keys() == RECORDED.keys()
    for task, expected in RECORDED.items():
        assert results[task] == pytest.approx(expected, abs=1e-5)
    written = json.loads((tmp_path / "out" / "lvis_instances_results.json").read_text())
    assert len(written) == len(detections) and {x["category_id"] for x in written} == set(range(1, 13))


def test_no_detection_at_all_and_categories_that_are_nowhere(make_evaluator):
    data, _ = make_case()
    data["annotations"] = [x for x in data["annotations"] if x["category_id"] % 3 != 1]  # no rare one
    evaluator = make_evaluator(data)
    nothing = Instances((HEIGHT, WIDTH), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0))
    nothing.pred_classes = torch.zeros(0, dtype=torch.long)
    evaluator.process([{"image_id": 1}], [{"instances": nothing}])
    results = evaluator.evaluate()["bbox"]
    assert results["AP"] == results["APf"] == 0 and np.isnan(results["APr"])


def test_a_test_set_without_annotations_gives_no_numbers(make_evaluator):
    data, _ = make_case()
    del data["annotations"]
    evaluator = make_evaluator(data)
    box = Instances((HEIGHT, WIDTH), pred_boxes=Boxes(torch.ones(1, 4)), scores=torch.ones(1))
    box.pred_classes = torch.tensor([11])
    evaluator.process([{"image_id": 1}], [{"instances": box}])
    assert evaluator.evaluate() == {}


def test_nothing_to_find_gives_no_numbers(make_evaluator):
    """No annotation, and no category that is known to be absent."""
    data, detections = make_case()
    data["annotations"] = []
    for image in data["images"]:
        image["neg_category_ids"] = []
    dataset = annotated_images(make_evaluator(data).dataset_name)
    detections = [{**x, "category_id": x["category_id"] - 1} for x in detections]
    results = average_precisions(dataset, detections, "bbox", "lvis")
    assert results.keys() == RECORDED["bbox"].keys() and all(np.isnan(x) for x in results.values())
