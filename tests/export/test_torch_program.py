"""The exported program: the detections of the model, at any size, with and without this package's Python."""

import pytest
import torch
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
from tests.ops.common import needs_cpp
from tests.small_model import build
from tests.torch_program import (
    BATCHES,
    LAYERS,
    LEVELS,
    RESNET,
    SMALLEST,
    assert_lines,
    assert_same,
    detections,
    metadata,
    random_batch,
    run_demo,
)

SWIN = ["MODEL.BACKBONE.NAME", "build_swin_backbone", "MODEL.SWIN.EMBED_DIM", 12, "MODEL.SWIN.DEPTHS", [2, 1, 1, 1]]
SWIN += ["MODEL.SWIN.NUM_HEADS", [1, 2, 2, 2], "MODEL.CODETR.IN_FEATURES", ["p1", "p2", "p3"]]


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


@needs_cpp
@pytest.mark.slow
def test_program_of_any_size(tmp_path):
    """At other sizes and numbers of pictures than it was exported with; then in a process without this package."""
    model = build(*SMALLEST, aux_heads=()).eval()
    program = export_program(model, "BGR")
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
