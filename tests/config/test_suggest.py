import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from torchvision.ops import box_iou

from codetr_d2.config.config_file import load_config
from codetr_d2.config.suggest import DatasetFacts, Machine, roi_anchors, suggest_config, write_config
from codetr_d2.engine.anchor_check import warn_of_unsuitable_anchors
from codetr_d2.engine.optimizer import batch_factor
from tests.tiny_run import CONFIGS

CPU = Machine("cpu")
MACHINES = [CPU, *(Machine("cuda", x) for x in (4, 8, 11, 16, 24, 80))]


def facts(side, image=(640, 480), number=200, per_image=3):
    """Images with objects of sides around ``side`` pixels."""
    rng = np.random.default_rng(0)
    sides = side * np.exp(rng.normal(0, 0.2, (number * per_image, 2)))
    owners = np.repeat(np.arange(number), per_image)
    return DatasetFacts(["a", "b"], np.array([image] * number, dtype=float), sides, owners)


def load(suggestion, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir(exist_ok=True)
    datasets = {x: (folder / x, folder / f"{x}.json") for x in ("train", "val")}
    write_config(folder / "config.yaml", suggestion, datasets, "output/mine", "")
    return load_config(str(folder / "config.yaml"))


@pytest.mark.parametrize("machine", MACHINES, ids=lambda x: f"{x.device}{x.memory_gb:g}")
@pytest.mark.parametrize("side", [4, 20, 100, 400])
def test_the_config_says_what_was_suggested(machine, side, tmp_path):
    """It is read as any other, with every option as suggested, for tiny objects and for large ones."""
    suggestion = suggest_config(facts(side), machine)
    cfg = load(suggestion, tmp_path)
    for key, value in suggestion.options.items():
        node = cfg
        for part in key.split("."):
            node = node[part]
        assert (list(node) if isinstance(node, tuple) else node) == value, key
    assert cfg.DATASETS.TRAIN == ("mine_train",) and cfg.DATASETS.TEST == ("mine_val",)
    assert cfg.DATASETS.COCO_JSON[1] == ["mine_val", str(tmp_path / "mine/val"), str(tmp_path / "mine/val.json")]
    assert cfg.SOLVER.IMS_PER_BATCH % cfg.SOLVER.ACCUMULATE_STEPS == 0
    assert len(cfg.MODEL.ANCHOR_GENERATOR.SIZES) == cfg.MODEL.CODETR.NUM_FEATURE_LEVELS + 1


@pytest.mark.parametrize("side", [5, 10, 30, 100])
def test_anchors_fit_the_objects(side, tmp_path, caplog):
    """By the model's own anchors: training has nothing to warn of, and torchvision finds the share that is noted."""
    data = facts(side, (128, 128))
    suggestion = suggest_config(data, CPU)
    cfg = load(suggestion, tmp_path)
    cfg.MODEL.CODETR.AUX_HEADS = ["roi", "atss", "paa", "retinanet", "gfl"]
    model = build_model(cfg)
    scale = cfg.INPUT.MIN_SIZE_TEST / 128
    objects = [{"bbox": [0, 0, *x], "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 0} for x in data.box_sizes]
    warn_of_unsuitable_anchors(cfg, model, [{"height": 128, "width": 128, "annotations": objects}])
    assert caplog.records == []
    [roi] = (x for x in model.modules() if hasattr(x, "proposal_generator"))
    anchors = torch.cat(list(roi.proposal_generator.anchor_generator.cell_anchors)).double()
    half = torch.from_numpy(data.box_sizes * scale / 2)
    share = (box_iou(torch.cat([-half, half], dim=1), anchors).amax(dim=1) >= 0.5).double().mean().item()
    assert share > 0.97
    assert f"{100 * share:.0f}% of the objects" in suggestion.reasons["MODEL.ANCHOR_GENERATOR.SIZES"]


def test_published_anchors_where_they_fit(tmp_path):
    """Objects as in COCO: the options are those of the published config, to the tenth of a pixel."""
    suggestion = suggest_config(facts(60, number=2000), Machine("cuda", 12))
    cfg, published = load(suggestion, tmp_path), load_config(str(CONFIGS / suggestion.base))
    assert np.allclose(cfg.MODEL.ANCHOR_GENERATOR.SIZES, published.MODEL.ANCHOR_GENERATOR.SIZES, atol=0.05)
    for head in ("ATSS", "RETINANET", "PAA", "GFL"):
        assert cfg.MODEL[head].ANCHOR_SCALE == published.MODEL[head].ANCHOR_SCALE


def test_anchors_of_twice_the_factor_are_twice_as_large():
    assert np.allclose(roi_anchors((8, 16), 2.0), 2 * np.array(roi_anchors((8, 16), 1.0)))
    assert np.allclose(roi_anchors((8,), 1.0), [[32, 32 * 2 ** (1 / 3), 32 * 4 ** (1 / 3)]])


def test_image_size_follows_the_objects():
    """Half the objects' size, twice the picture; within limits, and never above twice the pictures' own."""

    def size(side, image=(640, 480), machine=MACHINES[-1]):
        return suggest_config(facts(side, image), machine).options["INPUT.MIN_SIZE_TEST"]

    assert size(30) == pytest.approx(480 * 32 / (30 * math.exp(-1.2816 * 0.2 / math.sqrt(2))), abs=16 + 8)
    assert size(60) == 480 and size(2) == 960 and size(2, (1000, 2000)) == 1024
    assert size(300) == 480 and size(20, (100, 100)) == 192  # the multiple of 16 next to twice
    assert size(60, machine=CPU) < size(60)


def test_small_pictures_are_not_cropped():
    for machine, side in ((CPU, 20), (Machine("cuda", 24), 300)):
        assert suggest_config(facts(side), machine).options["INPUT.CROP.ENABLED"] is False
    assert "INPUT.CROP.ENABLED" not in suggest_config(facts(10), Machine("cuda", 24)).options


@pytest.mark.parametrize(
    "memory, base, batch, parts",
    [
        (4, "quick_start/", 4, 1),
        (8, "co_deformable_detr/", 4, 2),
        (24, "co_dino/", 8, 1),
        (80, "co_dino/", 16, 1),
    ],
)
def test_what_fits_into_a_gpu(memory, base, batch, parts):
    """Pictures of up to 592 x 800 pixels are 0.44 of 800 x 1333: 1.6 GB each, of 85% of the memory."""
    options = suggest_config(facts(37), Machine("cuda", memory))
    assert options.base.startswith(base)
    assert options.options["SOLVER.IMS_PER_BATCH"] == batch
    assert options.options.get("SOLVER.ACCUMULATE_STEPS", 1) == parts


def test_the_learning_rate_follows_the_batch(tmp_path):
    cfg = load(suggest_config(facts(37), Machine("cuda", 8)), tmp_path)
    assert cfg.SOLVER.IMS_PER_BATCH == 4 and cfg.SOLVER.BASE_LR * batch_factor(cfg) == pytest.approx(0.0002 / 4)
    for machine in (CPU, Machine("cuda", 4)):
        cfg = load(suggest_config(facts(37), machine), tmp_path)
        assert cfg.SOLVER.IMS_PER_BATCH == 4 and cfg.SOLVER.BASE_LR * batch_factor(cfg) == 0.0005


@pytest.mark.parametrize("number, epochs", [(10, 200), (100, 40), (600, 7), (5000, 5)])
def test_epochs_from_the_number_of_images(number, epochs):
    options = suggest_config(facts(20, number=number), CPU).options
    assert options["SOLVER.MAX_EPOCHS"] == epochs
    assert options["SOLVER.STEPS_EPOCHS"] == [round(0.8 * epochs)]


def test_crowded_pictures_have_more_queries():
    options = suggest_config(facts(20, number=5, per_image=110), CPU).options
    assert options["MODEL.CODETR.NUM_QUERIES"] == options["TEST.DETECTIONS_PER_IMAGE"] == 200
    assert "MODEL.CODETR.NUM_QUERIES" not in suggest_config(facts(20), CPU).options


def test_facts_of_a_dataset():
    """Crowds, objects without an area and images that are not chosen are left out."""
    images = [{"id": i, "width": 10 * i, "height": 5} for i in (1, 2, 3)]
    boxes = [
        (1, [0, 0, 4, 2], 0),
        (3, [0, 0, 6, 1], 0),
        (3, [0, 0, 0, 1], 0),
        (3, [0, 0, 9, 9], 1),
        (2, [0, 0, 7, 7], 0),
    ]
    coco = {
        "images": images,
        "annotations": [{"image_id": i, "bbox": box, "iscrowd": crowd} for i, box, crowd in boxes],
        "categories": [{"id": 1, "name": "x"}],
    }
    found = DatasetFacts.of_coco(coco, [True, False, True])
    assert found.image_sizes.tolist() == [[10, 5], [30, 5]] and found.class_names == ["x"]
    assert found.box_sizes.tolist() == [[4, 2], [6, 1]] and found.owners.tolist() == [0, 1]


def test_pictures_without_objects(tmp_path):
    data = facts(20)
    empty = dataclasses.replace(data, box_sizes=np.zeros((0, 2)), owners=np.zeros(0, dtype=int))
    for machine in MACHINES:
        assert "MODEL.ANCHOR_GENERATOR.SIZES" not in suggest_config(empty, machine).options
        load(suggest_config(empty, machine), tmp_path)


def test_time_grows_with_pictures_and_pixels():
    """On a CPU, as the quick starts were measured: 0.08 s for each picture of 128 pixels, 0.25 s at 256."""
    tiny, small = (suggest_config(facts(40, (x, x), number=2000), CPU) for x in (128, 256))
    assert tiny.options["INPUT.MIN_SIZE_TEST"] == 128 and tiny.options["SOLVER.MAX_EPOCHS"] == 5
    minutes = [int(re.search(r"about (\d+) minutes", x.time)[1]) for x in (tiny, small)]
    assert minutes[0] == pytest.approx(10_000 * 0.08 / 60, abs=1)
    assert small.options["INPUT.MIN_SIZE_TEST"] == 128 and minutes[1] == minutes[0]
    large = suggest_config(facts(19, (256, 256), number=2000), CPU)
    assert large.options["INPUT.MIN_SIZE_TEST"] == 256
    assert int(re.search(r"about (\d+) minutes", large.time)[1]) == pytest.approx(10_000 * 0.25 / 60, abs=2)
    assert "hours on two CPU cores" in suggest_config(facts(16, (256, 256), number=20_000), CPU).time
    assert tiny.time in tiny.reasons["SOLVER.MAX_EPOCHS"]
    assert suggest_config(facts(16), Machine("cuda", 4)).time == ""  # was not measured
    assert "H200" in suggest_config(facts(100), Machine("cuda", 24)).time


def test_tiles_are_advised_for_small_objects_in_large_pictures():
    large = suggest_config(facts(24, (2000, 1500)), CPU)
    tile = int(re.search(r"--tile (\d+)", large.advice)[1])
    assert "5 pixels or more" in large.advice and 384 < tile < 576
    # Tiles of that size need no smaller ones.
    assert suggest_config(facts(24, (tile, tile)), CPU).advice == ""
    assert suggest_config(facts(24, (300, 300)), CPU).advice == ""
    assert suggest_config(facts(200, (2000, 1500)), CPU).advice == ""
