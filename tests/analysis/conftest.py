"""Runs of a tiny model, and a dataset of three small pictures for them."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from codetr_d2_programs import analyze as analyze_program
from tests.tiny_run import write_tiny_run

SIZES = [(60, 40), (40, 60), (50, 50)]  # (width, height)
_numbers = itertools.count()  # a dataset's name can be registered once


@pytest.fixture
def write_data(tmp_path):
    """A function that writes pictures and annotations. Returns the entry for DATASETS.COCO_JSON."""

    def write(masks=False, boxes=True, annotated=True):
        name = f"analysed_{next(_numbers)}"
        folder = tmp_path / name
        folder.mkdir()
        images, annotations = [], []
        for i, (width, height) in enumerate(SIZES):
            pixels = np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
            for box in ([10, 10, 20, 10], [30, 20, 8, 16]) if boxes else ():
                x, y, w, h = box
                annotation = {"id": len(annotations) + 1, "image_id": i, "category_id": 1, "bbox": box, "iscrowd": 0}
                annotation["area"] = w * h
                if masks:  # the lower left triangle
                    annotation["segmentation"] = [[x, y, x, y + h, x + w, y + h]]
                annotations.append(annotation)
        content = {"images": images, "categories": [{"id": c + 1, "name": str(c)} for c in range(10)]}
        if annotated:
            content["annotations"] = annotations
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        return [name, str(folder), str(path)]

    return write


@pytest.fixture
def write_run(tmp_path):
    """A function that writes a run. Returns its ``CONFIG,WEIGHTS``."""

    def write(name, data, *opts):
        write_tiny_run(tmp_path / name, [data, data], opts)
        return f"{tmp_path / name / 'config.yaml'},{tmp_path / name / 'model_final.pth'}"

    return write


@pytest.fixture
def analyze():
    """The main function of ``codetr_d2 analyze``."""
    return analyze_program.main
