"""What several tests of the report share."""

import copy
import json

import pytest

from codetr_d2.data.annotations import read_coco_json
from codetr_d2.report.run import read_run
from codetr_d2.report.run_page import page_data
from tests.report.random_case import make_case
from tests.report.tiny_report import write_tiny_report_run


def read(data, detections, tmp_path):
    """The same as the project reads it: a dataset, and results with class indices."""
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(data))
    dataset = read_coco_json(str(file), lambda image: image["file_name"])
    return dataset, [{**x, "category_id": x["category_id"] // 10} for x in copy.deepcopy(detections)]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run with masks; see tiny_report.py."""
    return read_run(write_tiny_report_run(tmp_path_factory.mktemp("report")))


@pytest.fixture(scope="session")
def data(run):
    """What the page of the run holds."""
    return page_data([run], with_cost=False)


@pytest.fixture(params=[0, 1, 2])
def case(request, tmp_path):
    """(COCO's ground truth, COCO's detections, dataset, results)"""
    data, detections = make_case(request.param)
    return data, detections, *read(data, detections, tmp_path)
