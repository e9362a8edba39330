"""Small random models, exported, and whether they find the same: for the tests of the export."""

import onnx_ir as ir
import openvino
import torch

from codetr_d2.export.gate import compare_detections
from codetr_d2.export.onnx_graph import build_onnx_model
from codetr_d2.export.openvino import write_openvino
from codetr_d2.inference.exported import ExportedDetector
from codetr_d2.inference.openvino_session import with_own_attention
from codetr_d2.layers.deformable_attention import MultiScaleDeformableAttention
from tests.small_model import build

SWIN = ["MODEL.BACKBONE.NAME", "build_swin_backbone", "MODEL.CODETR.IN_FEATURES", ["p1", "p2", "p3"]]
SWIN += ["MODEL.SWIN.EMBED_DIM", 16, "MODEL.SWIN.DEPTHS", [1, 2, 1, 1], "MODEL.SWIN.NUM_HEADS", [1, 2, 2, 4]]
SWIN += ["MODEL.SWIN.WINDOW_SIZE", 5]
RESNET = ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.NORM", "BN"]
RESNET += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]]
RESNET += ["MODEL.CODETR.IN_FEATURES", ["res3", "res4", "res5"]]
EVA02 = ["MODEL.BACKBONE.NAME", "build_eva02_pyramid_backbone", "MODEL.CODETR.IN_FEATURES", ["p3", "p4", "p5"]]
EVA02 += ["MODEL.EVA02.EMBED_DIM", 32, "MODEL.EVA02.DEPTH", 2, "MODEL.EVA02.NUM_HEADS", 2, "MODEL.EVA02.WINDOW_SIZE", 4]
EVA02 += ["MODEL.EVA02.GLOBAL_BLOCKS", [1], "MODEL.EVA02.PRETRAIN_IMAGE_SIZE", 64, "MODEL.FPN.OUT_CHANNELS", 64]
EVA02 += ["MODEL.CODETR.NECK", "", "MODEL.CODETR.NUM_FEATURE_LEVELS", 3]
CO_DINO = ["MODEL.CODETR.QUERY_HEAD", "CoDINOHead"]

KINDS = {
    "Co-Deformable-DETR, masks of the ROI head": ["MODEL.MASK_ON", True],
    "Co-DINO, soft-NMS, BGR": [*CO_DINO, "MODEL.CODETR.SOFT_NMS_THRESH", 0.3, "INPUT.FORMAT", "BGR"],
    "Co-DINO, Swin, refined masks": [*CO_DINO, *SWIN, "MODEL.MASK_ON", True, "MODEL.CODETR.MASK_HEAD", "refine"],
    "Co-DINO, ResNet": [*CO_DINO, *RESNET],
    "EVA-02 on a canvas": [*EVA02, "MODEL.CODETR.CANVAS_SIZE", 192],
    "Conditional DETR": ["MODEL.CODETR.QUERY_HEAD", "ConditionalDETRHead"],
}
ONE_LAYER = ["MODEL.CODETR.ENCODER.NUM_LAYERS", 1, "MODEL.CODETR.DECODER.NUM_LAYERS", 1]


def lively(model):
    """Give a random model detections that are far from each other, in class, score and box."""
    torch.manual_seed(3)
    for name, layer in model.query_head.named_modules():
        if isinstance(layer, torch.nn.Linear) and "class_embed" in name:
            torch.nn.init.normal_(layer.weight, std=0.3)
        elif isinstance(layer, torch.nn.Linear) and "box_embed" in name and layer.out_features == 4:
            torch.nn.init.normal_(layer.weight, std=0.05)
    return model.eval()


def export(model, path, input_format="RGB", postprocess="top-k"):
    ir.save(build_onnx_model(model, input_format == "BGR", postprocess), path)
    return ExportedDetector(str(path), input_format)


@torch.no_grad()
def check_kind(kind, folder):
    """Export a model of a kind, and compare its detections at other sizes than it was exported with, in batches too."""
    options = KINDS[kind]
    input_format = "BGR" if "BGR" in options else "RGB"
    heads = ("roi", "atss") if kind != "EVA-02 on a canvas" else ()
    model = lively(build(*options, *ONE_LAYER, aux_heads=heads))
    exported = export(model, folder / "model.onnx", input_format, "soft-nms" if "soft-NMS" in kind else "top-k")
    # OpenVINO with deformable attention by the project's operator, as loading does.
    file = write_openvino(folder / "model.onnx", folder)
    attentions = sum(isinstance(x, MultiScaleDeformableAttention) for x in model.query_head.modules())
    assert with_own_attention(openvino.Core().read_model(file)) == attentions
    for sizes in ([(96, 128)], [(131, 177)], [(64, 150), (101, 98)], [(33, 40), (180, 131), (64, 64)]):
        inputs = [{"image": torch.randint(256, (3, *size)).float(), "height": 2 * size[0]} for size in sizes]
        expected = model(inputs)
        _assert_alike(expected, exported(inputs), kind, sizes)
        _assert_alike(expected, ExportedDetector(str(file), input_format)(inputs), kind, sizes)


def _assert_alike(expected, found, kind, sizes):
    number = 0
    for one, other in zip(expected, found):
        difference = compare_detections(one["instances"], other["instances"])
        number += difference.number
        assert not difference.missing and difference.box < 1e-2 and difference.score < 1e-4, (sizes, difference)
        assert (difference.mask is None) == ("masks" not in kind)
        if difference.mask is not None:  # of a mask of few pixels, one at 0.5 is a large share
            covered, covered_too = (x["instances"].pred_masks.sum(0) for x in (one, other))
            assert (covered - covered_too).abs().sum() <= 1e-3 * covered.sum()
        if "refined" in kind:
            torch.testing.assert_close(
                one["instances"].mask_scores, other["instances"].mask_scores, rtol=1e-3, atol=1e-4
            )
    assert number
