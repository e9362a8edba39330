"""The exported program: the detections of the model, at any size, with and without this package's Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import Conv2dSame

from codetr_d2.errors import InputError
from codetr_d2.export.torch_program import (
    Detector,
    SameConv,
    compile_program,
    export_program,
    program_sizes,
    save_program,
    with_simple_sizes,
)
from tests.ops.common import PACKAGE, needs_cpp
from tests.small_model import build

needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")

# The least that has all parts, on a backbone that exports fast.
LAYERS = ["MODEL.CODETR.ENCODER.NUM_LAYERS", 1, "MODEL.CODETR.DECODER.NUM_LAYERS", 1]
RESNET = ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 18]
RESNET += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"]]
LEVELS = ["MODEL.CODETR.IN_FEATURES", ["res4", "res5"], "MODEL.CODETR.NUM_FEATURE_LEVELS", 2]
SMALLEST = [*LAYERS, *RESNET, *LEVELS]
SWIN = ["MODEL.BACKBONE.NAME", "build_swin_backbone", "MODEL.SWIN.EMBED_DIM", 12, "MODEL.SWIN.DEPTHS", [2, 1, 1, 1]]
SWIN += ["MODEL.SWIN.NUM_HEADS", [1, 2, 2, 2], "MODEL.CODETR.IN_FEATURES", ["p1", "p2", "p3"]]
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
    """What the model itself finds, before soft-NMS, masks and boxes without area."""
    pictures = [image[:, :h, :w] for image, (h, w) in zip(images, image_sizes.tolist())]
    inputs = [{"image": x.flip(0) if input_format == "BGR" else x} for x in pictures]
    with torch.no_grad():
        memory = model.encode(model.features(model.preprocess(inputs)))
        found = model.query_head.finish(model.predict(memory), memory)
    for result, size in zip(found, image_sizes.tolist()):
        result.pred_boxes.clip(size)  # as finish of the whole model does: a canvas is larger than its picture
    parts = ([x.pred_boxes.tensor for x in found], [x.scores for x in found], [x.pred_classes for x in found])
    return tuple(map(torch.stack, parts))


def assert_same(output, expected):
    boxes, scores, classes = expected
    torch.testing.assert_close(output[0], boxes, rtol=0, atol=1e-4)
    torch.testing.assert_close(output[1], scores, rtol=0, atol=1e-6)
    assert torch.equal(output[2], classes)


@pytest.mark.parametrize(
    "options, input_format",
    [
        (["MODEL.CODETR.QUERY_HEAD", "CoDeformableDETRHead"], "BGR"),
        (["MODEL.CODETR.QUERY_HEAD", "CoDINOHead"], "RGB"),
        (["MODEL.CODETR.QUERY_HEAD", "ConditionalDETRHead"], "BGR"),
        (["MODEL.CODETR.QUERY_HEAD", "DABDETRHead"], "BGR"),
        (["MODEL.CODETR.CANVAS_SIZE", 320], "BGR"),
        (RESNET + LEVELS, "RGB"),
    ],
    ids=["co-deformable-detr", "co-dino", "conditional", "dab", "canvas", "resnet"],
)
def test_the_detector_without_branches_on_sizes(options, input_format):
    """Masks are always applied, and padding is looked at nowhere; this is what is exported."""
    model = build(*options, aux_heads=()).eval()
    detector = Detector(model, input_format).eval()
    for size, sizes in BATCHES:
        images, image_sizes = random_batch((320, 320) if model.canvas_size else size, sizes)
        with torch.no_grad():
            output = detector(images, image_sizes)
        assert_same(output, detections(model, images, image_sizes, input_format))


@pytest.mark.parametrize("kernel, stride, dilation", [(3, 2, 1), (5, 2, 1), (3, 1, 1), (2, 2, 1), (5, 3, 2), (1, 2, 1)])
def test_same_convolution(kernel, stride, dilation):
    conv = Conv2dSame(4, 6, kernel, stride, dilation=dilation, groups=2)
    for height, width in ((8, 9), (7, 12), (1, 30), (13, 11)):
        x = torch.randn(2, 4, height, width)
        torch.testing.assert_close(SameConv(conv)(x), conv(x))


def test_a_backbone_is_copied_with_its_weights():
    model = build(aux_heads=())
    copied = with_simple_sizes(model.backbone)
    assert any(isinstance(x, SameConv) for x in copied.modules())
    assert not any(isinstance(x, SameConv) for x in model.modules())
    assert {id(x) for x in copied.parameters()} == {id(x) for x in model.backbone.parameters()}


def test_sizes_and_refusals(monkeypatch, tmp_path):
    model = build(*SMALLEST, aux_heads=()).eval()
    assert program_sizes(model) == {"size": None, "multiple_of": 1, "smallest": 33}
    assert program_sizes(model, (64, 33)) == {"size": (64, 33), "multiple_of": 1, "smallest": 33}
    model.size_divisibility = 20
    assert program_sizes(model) == {"size": None, "multiple_of": 20, "smallest": 40}
    for size in ((64, 80), (20, 80)):
        with pytest.raises(InputError, match="multiples of 20 and at least 40"):
            program_sizes(model, size)
    model.canvas_size = 320
    assert program_sizes(model)["size"] == (320, 320)
    with pytest.raises(InputError, match="320 x 320 alone"):
        export_program(model, "BGR", (300, 320))
    model.is_compiled = True
    with pytest.raises(InputError, match="COMPILE"):
        export_program(model, "BGR")
    model.eval_head = "atss"
    with pytest.raises(InputError, match="EVAL_HEAD"):
        export_program(model, "BGR")
    with pytest.raises(InputError, match="--size"):
        export_program(build(*SWIN, *LAYERS, aux_heads=()).eval(), "BGR")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="no no-such-compiler"):
        compile_program(None, tmp_path / "x.pt2", {})


def metadata(sizes):
    return {"class_names": [f"class {i}" for i in range(10)], "min_size": 150, "max_size": 190, **sizes}


def run_demo(program, tmp_path):
    """demo/run_torch_program.py on one picture -> its lines; this package can't be imported there."""
    (tmp_path / "codetr_d2.py").write_text("raise ImportError")
    picture = np.random.default_rng(0).integers(0, 256, (100, 125, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    script = Path(__file__).parents[2] / "demo" / "run_torch_program.py"
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


@pytest.fixture(scope="module")
def exported():
    """A model and its program of any size."""
    model = build(*SMALLEST, aux_heads=()).eval()
    return model, export_program(model, "BGR")


@needs_cpp
@pytest.mark.slow
def test_program_of_any_size(exported, tmp_path):
    """At other sizes and numbers of pictures than it was exported with; then in a process without this package."""
    model, program = exported
    operators = {str(node.target) for node in program.graph.nodes}
    assert "codetr_d2.ms_deform_attn.default" in operators
    save_program(program, tmp_path / "detector.pt2", metadata(program_sizes(model)))
    loaded = torch.export.load(tmp_path / "detector.pt2").module()
    for size, sizes in BATCHES:
        images, image_sizes = random_batch(size, sizes)
        assert_same(loaded(images, image_sizes), detections(model, images, image_sizes, "BGR"))
    lines, images = run_demo(tmp_path / "detector.pt2", tmp_path)
    assert_lines(lines, detections(model, images, torch.tensor([[150, 188]]), "BGR"))


@needs_cpp
@needs_compiler
@pytest.mark.slow
def test_compiled_ahead_of_time(exported, tmp_path):
    """The same, compiled: it needs minutes."""
    model, program = exported
    compile_program(program, tmp_path / "compiled.pt2", metadata(program_sizes(model)))
    loaded = torch._inductor.aoti_load_package(str(tmp_path / "compiled.pt2"))
    for size, sizes in BATCHES:
        images, image_sizes = random_batch(size, sizes)
        assert_same(loaded(images, image_sizes), detections(model, images, image_sizes, "BGR"))
    lines, images = run_demo(tmp_path / "compiled.pt2", tmp_path)
    assert_lines(lines, detections(model, images, torch.tensor([[150, 188]]), "BGR"))


@needs_cpp
@pytest.mark.slow
@pytest.mark.parametrize(
    "options, size",
    [
        (["MODEL.CODETR.QUERY_HEAD", "CoDINOHead"], None),
        (["MODEL.CODETR.QUERY_HEAD", "ConditionalDETRHead"], None),
        (["MODEL.CODETR.SIZE_DIVISIBILITY", 32], None),
        (SWIN, (320, 352)),
    ],
    ids=["co-dino", "conditional", "multiples", "swin"],
)
def test_programs_of_other_models(options, size):
    """But for the last, with EfficientNet, which pads as TensorFlow does."""
    model = build(*options, *LAYERS, aux_heads=()).eval()
    program = export_program(model, "RGB", size).module()
    for (height, width), sizes in BATCHES:
        unit = model.size_divisibility
        padded = (-(-height // unit) * unit, -(-width // unit) * unit)
        if "build_swin_backbone" in options:  # one picture of one size
            padded, sizes = size, [size]
        images, image_sizes = random_batch(padded, sizes)
        assert_same(program(images, image_sizes), detections(model, images, image_sizes, "RGB"))
