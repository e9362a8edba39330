"""A small detector as a torch program, and what it has to find: for the tests of it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment

from tests.ops.common import PACKAGE

# The least that has all parts, on a backbone that exports fast.
LAYERS = ["MODEL.CODETR.ENCODER.NUM_LAYERS", 1, "MODEL.CODETR.DECODER.NUM_LAYERS", 1]
RESNET = ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 18]
RESNET += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"]]
LEVELS = ["MODEL.CODETR.IN_FEATURES", ["res4", "res5"], "MODEL.CODETR.NUM_FEATURE_LEVELS", 2]
SMALLEST = [*LAYERS, *RESNET, *LEVELS]
# Sizes of the padded batch, and of its pictures.
BATCHES = [
    ((97, 131), [(97, 131), (90, 100), (70, 131)]),
    ((160, 256), [(160, 256)]),
    ((225, 301), [(225, 180), (180, 301)]),
]


def random_batch(size, sizes):
    """Noise everywhere, in the padding too, which a program must not look at."""
    images = torch.randint(0, 256, (len(sizes), 3, *size), generator=torch.Generator().manual_seed(0))
    return images.to(torch.uint8), torch.tensor(sizes)


def detections(model, images, image_sizes, input_format):
    """What the model itself finds, before soft-NMS and masks; the scores of boxes without area are 0."""
    pictures = [image[:, :h, :w] for image, (h, w) in zip(images, image_sizes.tolist())]
    inputs = [{"image": x.flip(0) if input_format == "BGR" else x} for x in pictures]
    with torch.no_grad():
        memory = model.encode(model.features(model.preprocess(inputs)))
        found = model.query_head.finish(model.predict(memory), memory)
    for result, size in zip(found, image_sizes.tolist()):
        result.pred_boxes.clip(size)  # as finish of the whole model does: a canvas is larger than its picture
        result.scores[~result.pred_boxes.nonempty()] = 0.0
    parts = ([x.pred_boxes.tensor for x in found], [x.scores for x in found], [x.pred_classes for x in found])
    return tuple(map(torch.stack, parts))


@torch.no_grad()
def assert_same(output, expected):
    """The same detections, in the same order but for those whose scores are equal but for rounding."""
    torch.testing.assert_close(output[1], expected[1], rtol=0, atol=1e-6)
    for boxes, scores, classes, *others in zip(*output, *expected):
        expected_boxes, expected_scores, expected_classes = others
        distances = torch.cdist(expected_boxes, boxes, p=float("inf")) + (expected_scores[:, None] - scores).abs()
        _, order = linear_sum_assignment(distances + 1e6 * (expected_classes[:, None] != classes))
        torch.testing.assert_close(boxes[order], expected_boxes, rtol=0, atol=1e-4)
        torch.testing.assert_close(scores[order], expected_scores, rtol=0, atol=1e-6)
        assert torch.equal(classes[order], expected_classes)


def metadata(sizes):
    return {"class_names": [f"class {i}" for i in range(10)], "min_size": 150, "max_size": 190, **sizes}


def run_demo(program, tmp_path):
    """demo/run_torch_program.py on one picture -> its lines; this package can't be imported there."""
    (tmp_path / "codetr_d2.py").write_text("raise ImportError")
    picture = np.random.default_rng(0).integers(0, 256, (100, 125, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    script = Path(__file__).parents[1] / "demo" / "run_torch_program.py"
    library = next(PACKAGE.glob("_C.*"))
    command = [sys.executable, script, program, library, tmp_path / "picture.png", "--threshold", "0"]
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # The shorter side becomes 150 pixels, the longer one then 188.
    resized = Image.fromarray(picture).resize((188, 150), Image.Resampling.BILINEAR)
    return done.stdout.splitlines(), torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None]


def assert_lines(lines, expected):
    boxes, scores, classes = (x[0] for x in expected)
    boxes = boxes * (125 / 188)
    whole = (boxes[:, 2:] > boxes[:, :2]).all(1)
    assert len(lines) == whole.sum() > 0
    for line, box, score, label in zip(lines, boxes[whole], scores[whole], classes[whole]):
        name, number, found_score, *found_box = line.split()
        assert (name, int(number)) == ("class", label)
        assert abs(float(found_score) - score) < 1e-3
        assert (torch.tensor(list(map(float, found_box))) - box).abs().max() < 0.06
