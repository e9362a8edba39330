import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from codetr_d2 import add_codetr_config
from codetr_d2.errors import InputError

PYRAMID = ["p2", "p3", "p4", "p5", "p6"]
TINY_SWIN = {"MODEL.SWIN.EMBED_DIM": 8, "MODEL.SWIN.DEPTHS": [1, 1, 1, 1], "MODEL.SWIN.NUM_HEADS": [1, 2, 2, 4]}
TINY_VIT = {
    "MODEL.CODETR.IN_FEATURES": PYRAMID,
    "MODEL.EVA02.EMBED_DIM": 32,
    "MODEL.EVA02.DEPTH": 2,
    "MODEL.EVA02.NUM_HEADS": 2,
    "MODEL.EVA02.WINDOW_SIZE": 3,
    "MODEL.EVA02.GLOBAL_BLOCKS": [1],
    "MODEL.EVA02.PRETRAIN_IMAGE_SIZE": 64,
}


def mask_rcnn_config(backbone, features, options):
    """detectron2's Mask R-CNN on a backbone, whose features the RPN and, but for a fifth, the ROI heads read."""
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.BACKBONE.NAME = backbone
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.RPN.IN_FEATURES = features
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32]] * len(features)
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = features[:4]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    for key, value in options.items():
        cfg.merge_from_list([key, value])
    return cfg


@pytest.mark.parametrize(
    ("backbone", "features", "options"),
    [
        ("build_swin_fpn_backbone", PYRAMID, {**TINY_SWIN, "MODEL.FPN.IN_FEATURES": ["p0", "p1", "p2", "p3"]}),
        ("build_swin_backbone", ["p2"], {**TINY_SWIN, "MODEL.CODETR.IN_FEATURES": ["p2"]}),
        ("build_eva02_pyramid_backbone", PYRAMID, TINY_VIT),
        ("build_eva02_pyramid_backbone", PYRAMID, {**TINY_VIT, "MODEL.EVA02.IMAGE_SIZE": 128}),
        (
            "build_timm_fpn_backbone",
            PYRAMID,
            {
                "MODEL.TIMM.NAME": "convnext_atto",
                "MODEL.FPN.IN_FEATURES": ["stride4", "stride8", "stride16", "stride32"],
            },
        ),
    ],
)
def test_mask_rcnn_trains_every_parameter_and_detects(backbone, features, options):
    torch.manual_seed(0)
    model = build_model(mask_rcnn_config(backbone, features, options))
    masks = torch.zeros(2, 70, 100, dtype=torch.bool)
    masks[0, 10:40, 10:50] = masks[1, 20:60, 40:90] = True
    boxes = BitMasks(masks).get_bounding_boxes()
    truth = Instances((70, 100), gt_boxes=boxes, gt_classes=torch.tensor([0, 2]), gt_masks=BitMasks(masks))
    image = torch.randint(0, 256, (3, 70, 100))
    with EventStorage():
        losses = model.train()([{"image": image, "instances": truth}])
    assert {"loss_rpn_cls", "loss_cls", "loss_box_reg", "loss_mask"} <= set(losses)
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()
    untouched = [n for n, p in model.backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert not untouched
    with torch.no_grad():
        (result,) = model.eval()([{"image": image, "height": 70, "width": 100}])
    assert isinstance(result["instances"].pred_boxes, Boxes)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("build_swin_fpn_backbone", "'res2'; it may be: p0, p1, p2, p3"),
        ("build_timm_fpn_backbone", "lite0 has no.*stride32"),
    ],
)
def test_features_that_do_not_exist(backbone, message):
    cfg = mask_rcnn_config(backbone, PYRAMID, {"MODEL.FPN.IN_FEATURES": ["res2"]})
    with pytest.raises(InputError, match=r"MODEL\.FPN\.IN_FEATURES.*" + message):
        build_backbone(cfg)
