"""``VIS_PERIOD``: what the pictures show, and a training that does not notice."""

import math

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from codetr_d2.engine import check_config, load_config, setup
from codetr_d2.engine.trainer import CoDETRTrainer
from codetr_d2.errors import InputError
from codetr_d2.modeling.training_pictures import TrainingPictures
from tests.tiny_run import write_tiny_run

SIZE = (256, 512)  # height and width, at which nothing is enlarged


def sample(boxes=(), image=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    instances = Instances(SIZE, gt_boxes=Boxes(boxes), gt_classes=torch.zeros(len(boxes), dtype=torch.int64))
    return {"image": torch.zeros(3, *SIZE, dtype=torch.uint8) if image is None else image, "instances": instances}


def predictions(*scores_and_boxes):
    """[1, Q, 2] logits and [1, Q, 4] boxes of class 0, from (probability, xyxy in pixels)."""
    logits = torch.full((1, len(scores_and_boxes), 2), -20.0)
    boxes = torch.zeros(1, len(scores_and_boxes), 4)
    for i, (score, (x0, y0, x1, y1)) in enumerate(scores_and_boxes):
        logits[0, i, 0] = math.log(score / (1 - score))
        boxes[0, i] = torch.tensor([(x0 + x1) / 2 / 512, (y0 + y1) / 2 / 256, (x1 - x0) / 512, (y1 - y0) / 256])
    return logits, boxes


def put(pictures, inputs, outputs, iteration=0):
    """The halves [256, 512, 3] of each picture that an iteration puts."""
    with EventStorage(iteration) as storage:
        pictures.put(inputs, *outputs, [SIZE] * len(inputs))
        assert all(step == iteration for _, _, step in storage._vis_data)
        drawn = [picture.transpose(1, 2, 0) for _, picture, _ in storage._vis_data]
    return [(picture[:, :512], picture[:, -512:]) for picture in drawn]


def outlined(half, box):
    """Whether a picture has the outline of a box xyxy, about, on black."""
    x0, y0, x1, y1 = box
    lines = half[y0 - 1 : y0 + 2, x0:x1], half[y1 - 1 : y1 + 2, x0:x1], half[y0:y1, x0 - 1 : x0 + 2]
    return all((line.max(axis=2) > 100).any(axis=0 if line.shape[0] == 3 else 1).mean() > 0.6 for line in lines)


TRUE, FOUND, WORSE = (40, 100, 140, 180), (300, 60, 400, 200), (200, 120, 260, 240)


def test_ground_truth_is_left_and_as_many_predictions_right():
    pictures = TrainingPictures(1, "RGB", ["thing", "other"])
    outputs = predictions((0.3, WORSE), (0.9, FOUND))
    [(left, right)] = put(pictures, [sample([TRUE])], outputs)
    assert outlined(left, TRUE) and not outlined(left, FOUND)
    assert outlined(right, FOUND) and not outlined(right, TRUE) and not outlined(right, WORSE)
    [(left, right)] = put(pictures, [sample([TRUE, FOUND])], outputs, 1)
    assert outlined(left, TRUE) and outlined(left, FOUND) and outlined(right, FOUND) and outlined(right, WORSE)
    [(left, right)] = put(pictures, [sample()], outputs, 2)
    assert not left.any() and outlined(right, FOUND) and not outlined(right, WORSE)


@pytest.mark.parametrize(
    "name, pixel, colour",
    [
        ("RGB", (200, 100, 0), (200, 100, 0)),
        ("BGR", (0, 100, 200), (200, 100, 0)),
        ("L", (90,), (90, 90, 90)),
        ("L", (90, 90, 90), (90, 90, 90)),
    ],
)
def test_colours_are_those_of_the_format(name, pixel, colour):
    image = torch.tensor(pixel, dtype=torch.uint8)[:, None, None].expand(-1, *SIZE)
    for each in (image, image.float()):
        [(left, right)] = put(TrainingPictures(1, name, []), [sample([TRUE], each)], predictions((0.9, FOUND)))
        assert left[5, 5].tolist() == right[250, 5].tolist() == list(colour)


def test_a_small_image_is_enlarged():
    inputs = [{"image": torch.zeros(3, 16, 32, dtype=torch.uint8), "instances": sample()["instances"]}]
    with EventStorage() as storage:
        TrainingPictures(1, "RGB", []).put(inputs, *predictions((0.9, FOUND)), [(16, 32)])
        assert storage._vis_data[0][1].shape == (3, 256, 512 + 8 + 512)


def test_one_picture_a_period_of_the_first_image_in_the_main_process(monkeypatch):
    pictures = TrainingPictures(3, "RGB", [])
    inputs, outputs = [sample([TRUE]), sample()], [x.repeat(2, 1, 1) for x in predictions((0.9, FOUND))]
    drawn = [len(put(pictures, inputs, outputs, iteration)) for iteration in (0, 1, 2, 3, 3, 4, 6)]
    assert drawn == [1, 0, 0, 1, 0, 0, 1]  # the second time in iteration 3 is another micro-batch
    assert not put(pictures, inputs, [outputs[0] * math.nan, outputs[1]], 9)  # a diverged model
    assert put(pictures, inputs, [x.bfloat16() for x in outputs], 12)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert not put(pictures, inputs, outputs, 15)


@pytest.mark.parametrize("key, value", [("SOLVER.WRITERS", ["json"]), ("VIS_PERIOD", -1)])
def test_pictures_need_tensorboard(config_file, key, value):
    cfg = load_config(str(config_file), ["VIS_PERIOD", "5"])
    check_config(cfg)
    cfg.merge_from_list([key, value])
    messages = {
        "VIS_PERIOD": "VIS_PERIOD is -1; it must be at least 0",
        "SOLVER.WRITERS": "add 'tensorboard' to SOLVER",
    }
    with pytest.raises(InputError, match=messages[key]):
        check_config(cfg)


@pytest.mark.slow
def test_the_training_is_the_same_to_the_last_bit(coco_json, tmp_path):
    opts = ("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.CODETR.NUM_CLASSES", 3, "MODEL.CODETR.CLASS_NAMES", [])
    opts += ("MODEL.CODETR.AUX_HEADS", ["roi"], "MODEL.CODETR.DECODER.DROPOUT", 0.3, "MODEL.MASK_ON", True)
    opts += ("SOLVER.MAX_EPOCHS", 0, "SOLVER.MAX_ITER", 4, "DATASETS.TEST", ())
    opts += ("SOLVER.IMS_PER_BATCH", 2, "SOLVER.ACCUMULATE_STEPS", 2, "DATALOADER.NUM_WORKERS", 0, "SEED", 1)
    write_tiny_run(tmp_path / "written", coco_json, opts)

    def train(name, period):
        (tmp_path / name).mkdir()
        changes = ["OUTPUT_DIR", str(tmp_path / name), "VIS_PERIOD", str(period)]
        trainer = CoDETRTrainer(setup(load_config(str(tmp_path / "written" / "config.yaml"), changes)))
        trainer.train()
        events = EventAccumulator(str(tmp_path / name)).Reload()
        return {tag: [(x.step, x.width, x.height) for x in events.Images(tag)] for tag in events.Tags()["images"]}

    assert train("without", 0) == {}
    pictures = train("with", 2)
    assert list(pictures) == [TrainingPictures.NAME]
    assert [step for step, _, _ in pictures[TrainingPictures.NAME]] == [0, 2]
    assert all(512 + 8 + 512 >= width > 512 for _, width, _ in pictures[TrainingPictures.NAME])
    without, drawn = (
        torch.load(tmp_path / x / "model_final.pth", weights_only=True)["model"] for x in ("without", "with")
    )
    assert without.keys() == drawn.keys() and all(torch.equal(without[name], drawn[name]) for name in drawn)
