"""A random data set with crowds and masks, with detections near and far from its objects."""

import numpy as np
import pycocotools.mask as mask_util

SIZE = 100  # pixels of each side of a picture
NUM_CLASSES = 4  # the last one has no object


def octagon(x, y, w, h):
    cut = min(w, h) / 4
    points = [(x + cut, y), (x + w - cut, y), (x + w, y + cut), (x + w, y + h - cut)]
    points += [(x + w - cut, y + h), (x + cut, y + h), (x, y + h - cut), (x, y + cut)]
    return [float(v) for point in points for v in point]


def encode(*box):
    mask = mask_util.merge(mask_util.frPyObjects([octagon(*box)], SIZE, SIZE))
    return {"size": mask["size"], "counts": mask["counts"].decode()}


def make_case(seed, num_images=8, num_detections=60):
    """Ground truth and detections in COCO's formats, whose category ids are ten times a class index."""
    rng = np.random.default_rng(seed)
    images = [{"id": 7 * i + 3, "file_name": f"{i}.png", "height": SIZE, "width": SIZE} for i in range(num_images)]
    annotations, detections = [], []
    for image in images[1:]:  # the first has no object, but detections
        for _ in range(rng.integers(1, 7)):
            w, h = rng.uniform(12, 45, 2).round(1).tolist()
            box = [round(rng.uniform(0, SIZE - w), 1), round(rng.uniform(0, SIZE - h), 1), w, h]
            crowd = int(rng.random() < 0.15)
            mask = encode(*box) if crowd else [octagon(*box)]
            entry = {"image_id": image["id"], "category_id": 10 * int(rng.integers(NUM_CLASSES - 1)), "bbox": box}
            annotations.append(
                {**entry, "id": len(annotations) + 1, "iscrowd": crowd, "segmentation": mask, "area": w * h}
            )
    for image in images:
        own = [x for x in annotations if x["image_id"] == image["id"]]
        for _ in range(num_detections):
            box, category = rng.uniform(0, SIZE - 40, 2).tolist() + [30.0, 40.0], 10 * int(rng.integers(NUM_CLASSES))
            if own and rng.random() < 0.8:
                near = own[rng.integers(len(own))]
                box = (np.array(near["bbox"]) + rng.uniform(-8, 8, 4)).clip([0, 0, 5, 5], SIZE).tolist()
                category = near["category_id"] if rng.random() < 0.8 else category
            score = float(rng.random())
            result = {"image_id": image["id"], "category_id": category, "bbox": box, "score": score}
            detections.append({**result, "segmentation": encode(*box)})
    categories = [{"id": 10 * k, "name": f"class{k}"} for k in range(NUM_CLASSES)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}, detections
