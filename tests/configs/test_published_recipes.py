"""Every config against the facts of the published recipe of the same name (``published_recipes.json``).

The facts keep the published vocabulary. A recipe may name another one that it is ``like``; null takes a fact back.
"""

import json
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from codetr_d2 import add_codetr_config
from codetr_d2.engine import load_config

ROOT = Path(__file__).parents[2]
RECIPES = json.loads(Path(__file__).with_name("published_recipes.json").read_text())
FOLDERS = ("co_deformable_detr", "co_dino", "co_dino_vit")
# The published backbones start from these files; the LVIS recipe names its own result, see its config.
SWIN_LARGE = "models/swin_large_patch4_window12_384_22k.pth"
WEIGHTS = {
    "torchvision://resnet50": "detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    "models/co_dino_5scale_lsj_swin_large_3x_lvis.pth": SWIN_LARGE,
}


def recipe(name: str) -> dict:
    facts = dict(RECIPES[name])
    if "like" in facts:
        facts = {**recipe(facts.pop("like")), **facts}
    return {key: value for key, value in facts.items() if value is not None}


def config_file(name: str) -> Path:
    [path] = (path for folder in FOLDERS for path in (ROOT / "configs" / folder).glob(f"{name}.yaml"))
    return path


def expected_options(facts: dict) -> dict:
    """Our options by their full keys. Takes every fact that it uses out of ``facts``."""
    take = facts.pop
    layers = facts["decoder.layers"]
    is_dino = take("family") == "Co-DINO"
    options = {
        "MODEL.META_ARCHITECTURE": "CoDETR",
        "MODEL.CODETR.QUERY_HEAD": "CoDINOHead" if is_dino else "CoDeformableDETRHead",
        "MODEL.CODETR.NECK": {"ChannelMapper": "ChannelMapper", "SFP": ""}[take("neck.kind")],
        "MODEL.CODETR.NUM_QUERIES": take("queries"),
        "MODEL.CODETR.NUM_CLASSES": take("num_classes"),
        "MODEL.CODETR.EMBED_DIM": take("embed_dim"),
        "MODEL.CODETR.NUM_FEATURE_LEVELS": take("feature_levels_transformer"),
        "MODEL.CODETR.ENCODER.NUM_LAYERS": take("encoder.layers"),
        "MODEL.CODETR.ENCODER.FFN_DIM": take("encoder.ffn_dim"),
        "MODEL.CODETR.ENCODER.NUM_HEADS": take("encoder.heads"),
        "MODEL.CODETR.ENCODER.NUM_POINTS": take("encoder.sampling_points"),
        "MODEL.CODETR.ENCODER.DROPOUT": 0.0,
        "MODEL.CODETR.DECODER.NUM_LAYERS": take("decoder.layers"),
        "MODEL.CODETR.DECODER.FFN_DIM": take("decoder.ffn_dim"),
        "MODEL.CODETR.DECODER.NUM_HEADS": take("decoder.self_attention_heads"),
        "MODEL.CODETR.DECODER.NUM_POINTS": take("decoder.cross_attention_points"),
        "MODEL.CODETR.DECODER.DROPOUT": 0.0,
        "MODEL.CODETR.ACTIVATION_CHECKPOINTING": take("encoder.layers_with_activation_checkpointing") > 0,
        "MODEL.CODETR.AUX_HEADS": ["roi", "atss"][: take("collaborative.number_of_aux_heads")],
        "MODEL.CODETR.POSITIVE_QUERIES.MAX_PER_HEAD": take("collaborative.max_positive_coords_per_head"),
        "MODEL.CODETR.POSITIVE_QUERIES.MIN_PER_HEAD": take("collaborative.min_queries_per_head"),
        "MODEL.CODETR.POSITIVE_QUERIES.PADDING": "mask"
        if take("collaborative.zero_padding_of_short_query_sets")
        else "negatives",
        "MODEL.CODETR.LAMBDA1": take("collaborative.lambda_1_weight_of_aux_query_losses"),
        "MODEL.CODETR.LAMBDA2": take("collaborative.lambda_2_already_multiplied_into_aux_head_loss_weights"),
        "MODEL.CODETR.LOSS_CLS": take("query_losses.loss_cls.loss_weight"),
        "MODEL.CODETR.LOSS_BOX": take("query_losses.loss_bbox.loss_weight"),
        "MODEL.CODETR.LOSS_GIOU": take("query_losses.loss_iou.loss_weight"),
        "MODEL.CODETR.COST_CLS": take("matcher_costs.cls_cost.weight"),
        "MODEL.CODETR.COST_BOX": take("matcher_costs.reg_cost.weight"),
        "MODEL.CODETR.COST_GIOU": take("matcher_costs.iou_cost.weight"),
        "MODEL.CODETR.EVAL_HEAD": "detr",
        "TEST.DETECTIONS_PER_IMAGE": take("test_detr.max_per_img"),
        "TEST.AUG.ENABLED": False,
    }
    if is_dino:
        assert take("test_detr.nms.type") == "soft_nms"
        options["MODEL.CODETR.DENOISING.NUM_QUERIES"] = take("denoising.dn_queries")
        options["MODEL.CODETR.DENOISING.LABEL_NOISE"] = take("denoising.label_noise")
        options["MODEL.CODETR.DENOISING.BOX_NOISE"] = take("denoising.box_noise")
    options["MODEL.CODETR.SOFT_NMS_THRESH"] = take("test_detr.nms.iou_threshold", 0.0)
    # The weights of the auxiliary heads' losses: published with lambda 2 and the decoder's layers multiplied in.
    outer = options["MODEL.CODETR.LAMBDA2"] * layers
    for part in (expected_backbone, expected_rpn, expected_roi, expected_atss, expected_masks):
        options.update(part(take, outer))
    options.update(expected_solver(take))
    options.update(expected_data(take))
    return options


def expected_backbone(take, outer) -> dict:
    start, loaded = take("pretrained_backbone", ""), take("load_from_checkpoint", "")
    kind = take("backbone.kind")
    options = {"MODEL.WEIGHTS": loaded or WEIGHTS.get(start, start)}
    if kind == "ViT":
        window_blocks = take("backbone.window_block_indexes")
        size = take("backbone.img_size")
        return options | {
            "MODEL.BACKBONE.NAME": "build_eva02_pyramid_backbone",
            "MODEL.BACKBONE.FREEZE_AT": 0,
            "MODEL.CODETR.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
            "MODEL.FPN.OUT_CHANNELS": 256,
            "MODEL.EVA02.EMBED_DIM": take("backbone.embed_dim"),
            "MODEL.EVA02.NUM_HEADS": take("backbone.num_heads"),
            "MODEL.EVA02.PATCH_SIZE": take("backbone.patch_size"),
            "MODEL.EVA02.WINDOW_SIZE": take("backbone.window_size"),
            "MODEL.EVA02.GLOBAL_BLOCKS": [i for i in range(24) if i not in window_blocks],
            "MODEL.EVA02.DEPTH": take("backbone.depth"),
            "MODEL.EVA02.PRETRAIN_IMAGE_SIZE": take("backbone.pretrain_img_size"),
            "MODEL.EVA02.IMAGE_SIZE": size if take("backbone.use_lsj", False) else 0,
            "MODEL.EVA02.DROP_PATH_RATE": take("backbone.drop_path_rate"),
            "MODEL.EVA02.ACTIVATION_CHECKPOINTING": take("backbone.use_act_checkpoint"),
        }
    features = {"ResNet": ["res2", "res3", "res4", "res5"], "SwinTransformerV1": ["p0", "p1", "p2", "p3"]}[kind]
    used = [features[i] for i in take("backbone.out_indices")]
    options["MODEL.CODETR.IN_FEATURES"] = used
    if kind == "ResNet":
        return options | {
            "MODEL.BACKBONE.NAME": "build_resnet_backbone",
            "MODEL.BACKBONE.FREEZE_AT": 1 + take("backbone.frozen_stages"),  # detectron2 counts the stem
            "MODEL.RESNETS.DEPTH": take("backbone.depth"),
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
            "MODEL.RESNETS.NORM": "FrozenBN",
            "MODEL.RESNETS.OUT_FEATURES": used,
        }
    return options | {
        "MODEL.BACKBONE.NAME": "build_swin_backbone",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.SWIN.EMBED_DIM": take("backbone.embed_dim"),
        "MODEL.SWIN.DEPTHS": take("backbone.depths"),
        "MODEL.SWIN.NUM_HEADS": take("backbone.num_heads"),
        "MODEL.SWIN.WINDOW_SIZE": take("backbone.window_size"),
        "MODEL.SWIN.DROP_PATH_RATE": take("backbone.drop_path_rate"),
        "MODEL.SWIN.ACTIVATION_CHECKPOINTING": take("backbone.use_checkpoint"),
    }


def expected_rpn(take, outer) -> dict:
    base, scales = take("rpn.anchor_base_scale"), take("rpn.scales_per_octave")
    return {
        "MODEL.ANCHOR_GENERATOR.NAME": "RatioMajorAnchorGenerator",
        "MODEL.ANCHOR_GENERATOR.SIZES": [
            [base * stride * 2 ** (i / scales) for i in range(scales)] for stride in take("rpn.strides")
        ],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [take("rpn.ratios_h_over_w")],
        "MODEL.ANCHOR_GENERATOR.OFFSET": 0.0,
        "MODEL.PROPOSAL_GENERATOR.NAME": "CoRPN",
        "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 0,
        "MODEL.RPN.BBOX_REG_WEIGHTS": [1 / std for std in take("rpn.box_coder_stds")],
        "MODEL.RPN.BBOX_REG_LOSS_TYPE": "smooth_l1",
        "MODEL.RPN.SMOOTH_L1_BETA": 0.0,  # L1
        "MODEL.RPN.LOSS_WEIGHT": take("rpn.loss_cls.weight") / outer,
        "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": take("rpn.loss_box.weight") / outer,
        "MODEL.RPN.IOU_THRESHOLDS": [take("rpn.assigner.neg_iou_thr"), take("rpn.assigner.pos_iou_thr")],
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": take("rpn.sampler.num"),
        "MODEL.RPN.POSITIVE_FRACTION": take("rpn.sampler.pos_fraction"),
        "MODEL.RPN.BOUNDARY_THRESH": -1,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": take("rpn.train_proposals.nms_pre"),
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": take("rpn.train_proposals.max_per_img"),
        "MODEL.RPN.NMS_THRESH": take("rpn.train_proposals.nms.iou_threshold"),
        "MODEL.RPN.PRE_NMS_TOPK_TEST": take("rpn.test_proposals.nms_pre"),
        "MODEL.RPN.POST_NMS_TOPK_TEST": take("rpn.test_proposals.max_per_img"),
        "MODEL.RPN.NMS_THRESH_TEST": take("rpn.test_proposals.nms.iou_threshold"),
    }


def expected_roi(take, outer) -> dict:
    # ROIs go to the levels by detectron2's rule: the finest takes those below half of 224 pixels for a stride of 8.
    assert take("roi_head.roi_align.finest_scale") == 14 * take("roi_head.roi_align.strides")[0]
    assert take("roi_head.assigner.neg_iou_thr") == 0.5 and take("roi_head.reg_decoded_bbox")
    return {
        "MODEL.ROI_HEADS.NAME": "CoROIHeads",
        "MODEL.ROI_HEADS.IOU_THRESHOLDS": [take("roi_head.assigner.pos_iou_thr")],
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 512,
        "MODEL.ROI_HEADS.POSITIVE_FRACTION": 0.25,
        "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": True,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": take("roi_head.test.score_thr"),
        "MODEL.ROI_HEADS.NMS_THRESH_TEST": take("roi_head.test.nms.iou_threshold"),
        "MODEL.ROI_HEADS.SOFT_NMS": take("roi_head.test.nms.type") == "soft_nms",
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_CONV": take("roi_head.num_shared_convs", 0),
        "MODEL.ROI_BOX_HEAD.CONV_DIM": take("roi_head.conv_out_channels", 256),
        "MODEL.ROI_BOX_HEAD.NUM_FC": take("roi_head.num_shared_fcs", 2),
        "MODEL.ROI_BOX_HEAD.FC_DIM": take("roi_head.fc_out_channels"),
        "MODEL.ROI_BOX_HEAD.NORM": take("roi_head.norm_cfg.type", ""),
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": take("roi_head.reg_class_agnostic"),
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": [1 / std for std in take("roi_head.box_coder_stds")],
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "giou",
        # The losses of ROI heads have no weight for classification in detectron2.
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": take("roi_head.loss_box.loss_weight")
        / take("roi_head.loss_cls.loss_weight"),
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2",
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": take("roi_head.roi_align.size"),
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": take("roi_head.roi_align.sampling_ratio"),
    }


def expected_atss(take, outer) -> dict:
    take("atss_head.strides"), take("atss_head.test.score_thr")  # those of the pyramid; 0
    return {
        "MODEL.ATSS.NUM_CONVS": take("atss_head.stacked_convs"),
        "MODEL.ATSS.ANCHOR_SCALE": take("atss_head.anchor_base_scale"),
        "MODEL.ATSS.TOPK": take("atss_head.topk"),
        "MODEL.ATSS.BBOX_REG_WEIGHTS": [1 / std for std in take("atss_head.box_coder_stds")],
        "MODEL.ATSS.LOSS_CLS": take("atss_head.loss_cls.loss_weight") / outer,
        "MODEL.ATSS.LOSS_BOX": take("atss_head.loss_bbox.loss_weight") / outer,
        "MODEL.ATSS.LOSS_CENTERNESS": take("atss_head.loss_centerness.loss_weight") / outer,
        "MODEL.ATSS.PRE_NMS_TOPK_TEST": take("atss_head.test.nms_pre"),
        "MODEL.ATSS.NMS_THRESH_TEST": take("atss_head.test.nms.iou_threshold"),
        "MODEL.ATSS.SOFT_NMS": take("atss_head.test.nms.type") == "soft_nms",
    }


def expected_masks(take, outer) -> dict:
    if (weight := take("roi_head.mask.loss_mask.loss_weight", None)) is not None:
        assert weight == outer  # detectron2's mask loss has no weight of its own
        return {
            "MODEL.MASK_ON": True,
            "MODEL.CODETR.MASK_HEAD": "roi",
            "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
            "MODEL.ROI_MASK_HEAD.NUM_CONV": take("roi_head.mask.num_convs"),
            "MODEL.ROI_MASK_HEAD.CONV_DIM": take("roi_head.mask.conv_out_channels"),
            "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": take("roi_head.mask_roi_align.size"),
            "MODEL.ROI_MASK_HEAD.POOLER_TYPE": "ROIAlignV2",
            "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": 0,
        }
    if (weight := take("mask_branch.mask_head.loss_weight", None)) is not None:
        return {
            "MODEL.MASK_ON": True,
            "MODEL.CODETR.MASK_HEAD": "refine",
            "MODEL.REFINE_MASK_HEAD.LOSS_WEIGHT": weight,
            "MODEL.REFINE_MASK_HEAD.IOU_LOSS_WEIGHT": take("mask_branch.mask_iou_head.loss_iou.loss_weight"),
        }
    return {"MODEL.MASK_ON": False}


def expected_solver(take) -> dict:
    clip, momentum = take("optimizer.grad_clip.max_norm", None), take("ema.momentum", None)
    warmup = take("schedule.warmup.warmup_iters", 0)
    options = {
        "SOLVER.IMS_PER_BATCH": take("reference_total_batch"),
        "SOLVER.BASE_LR": take("optimizer.base_lr"),
        "SOLVER.WEIGHT_DECAY": take("optimizer.weight_decay"),
        "SOLVER.WEIGHT_DECAY_NORM": None,
        "SOLVER.WEIGHT_DECAY_BIAS": None,
        "SOLVER.BIAS_LR_FACTOR": 1.0,
        "SOLVER.LAYER_DECAY": take("optimizer.layer_decay.layer_decay_rate", 1.0),
        "SOLVER.CLIP_GRADIENTS.ENABLED": clip is not None,
        "SOLVER.MAX_EPOCHS": take("schedule.epochs"),
        "SOLVER.STEPS_EPOCHS": take("schedule.milestones"),
        "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
        "SOLVER.GAMMA": take("schedule.gamma"),
        "SOLVER.WARMUP_ITERS": warmup,
        "SOLVER.EMA.ENABLED": momentum is not None,
        "SOLVER.AMP.ENABLED": False,
    }
    if clip is not None:
        options |= {
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
            "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": clip,
            "SOLVER.CLIP_GRADIENTS.NORM_TYPE": 2.0,
        }
    if warmup:
        options["SOLVER.WARMUP_METHOD"] = "linear"
        options["SOLVER.WARMUP_FACTOR"] = take("schedule.warmup.warmup_ratio")
    if momentum is not None:
        options["SOLVER.EMA.DECAY"] = 1 - momentum
        options["SOLVER.EMA.WARMUP_ITERS"] = 2000
    return options


def expected_data(take) -> dict:
    is_lvis = take("data.dataset") == "LVISV1Dataset"
    repeat, canvas = take("data.oversample_thr", None), take("data.canvas", 0)
    long, short = take("data.test_scale")
    take("data.masks")  # follows from MODEL.MASK_ON and copy-paste
    # Padding is a part of the image on a canvas, and only there.
    assert take("use_padding_mask_in_transformer") == (canvas == 0)
    options = {
        "DATASETS.TRAIN": ["lvis_v1_train" if is_lvis else "coco_2017_train"],
        "DATASETS.TEST": ["lvis_v1_val" if is_lvis else "coco_2017_val"],
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS": take("data.filter_empty_gt"),
        "DATALOADER.SAMPLER_TRAIN": "TrainingSampler" if repeat is None else "RepeatFactorTrainingSampler",
        "MODEL.PIXEL_MEAN": take("data.norm.mean"),
        "MODEL.PIXEL_STD": take("data.norm.std"),
        "INPUT.FORMAT": "RGB",
        "INPUT.RANDOM_FLIP": "horizontal",
        "INPUT.MIN_SIZE_TEST": short,
        "INPUT.MAX_SIZE_TEST": long,
        "INPUT.LARGE_SCALE_JITTER.ENABLED": canvas > 0,
        "INPUT.COPY_PASTE.ENABLED": canvas > 0,
        "INPUT.CROP.ENABLED": canvas == 0,
        "MODEL.CODETR.CANVAS_SIZE": canvas,
    }
    if repeat is not None:
        options["DATALOADER.REPEAT_THRESHOLD"] = repeat
        options["DATALOADER.REPEAT_SQRT"] = True
    if canvas == 0:
        return options | {
            "INPUT.MIN_SIZE_TRAIN": take("data.short_sides"),
            "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
            "MODEL.CODETR.SIZE_DIVISIBILITY": take("data.size_divisor", 1),
            "INPUT.MAX_SIZE_TRAIN": take("data.long_limit"),
            "INPUT.CROP.TYPE": take("data.crop_type"),
            "INPUT.CROP.SIZE": take("data.crop_size"),
        }
    # Two released ViT recipes leave the jitter out by an oversight; it is that of the others.
    smallest, largest = take("data.scale_range", (0.1, 2.0))
    return options | {
        "MODEL.CODETR.CANVAS_VALUE": take("data.pad_value", [114])[0],
        "INPUT.MASK_FORMAT": "bitmask",
        "INPUT.LARGE_SCALE_JITTER.MIN_SCALE": smallest,
        "INPUT.LARGE_SCALE_JITTER.MAX_SCALE": largest,
        "INPUT.COPY_PASTE.MAX_NUM_PASTED": take("data.max_num_pasted"),
    }


def option(cfg, key: str):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def plain(value):
    """Tuples as lists, and numbers as far as they are meant."""
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def test_every_published_recipe_has_a_config():
    assert len(RECIPES) == 30
    assert set(RECIPES) <= {path.stem for folder in FOLDERS for path in (ROOT / "configs" / folder).glob("*.yaml")}


@pytest.mark.parametrize("name", RECIPES)
def test_config_equals_the_published_recipe(name):
    facts = recipe(name)
    multipliers = {key: facts.pop(key) for key in list(facts) if key.startswith("optimizer.lr_multipliers.")}
    options = expected_options(facts)
    assert facts == {}  # every fact was looked at
    cfg = load_config(str(config_file(name)))
    differing = {
        key: (plain(option(cfg, key)), plain(value))
        for key, value in options.items()
        if plain(option(cfg, key)) != plain(value)
    }
    assert differing == {}

    # The learning rates of one parameter of each kind. A two-stage detector has no published "reference_points".
    is_vit = cfg.MODEL.BACKBONE.NAME == "build_eva02_pyramid_backbone"
    for parameter, kind in (
        ("backbone.net.patch_embed.proj.weight" if is_vit else "backbone.stem.conv1.weight", "backbone"),
        ("backbone.p2.0.weight" if is_vit else "neck.convs.0.0.weight", "neck"),
        ("query_head.decoder.layers.0.cross_attn.sampling_offsets.weight", "sampling_offsets"),
        ("query_head.decoder.layers.0.ffn.0.weight", "other"),
    ):
        factor = next((factor for part, factor in cfg.SOLVER.LR_MULTIPLIERS if part in parameter), 1.0)
        assert factor == multipliers.get(f"optimizer.lr_multipliers.{kind}", 1.0), parameter


@pytest.mark.parametrize("name", RECIPES)
def test_detectron2_reads_the_config_alike(name):
    path = str(config_file(name))
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.merge_from_file(path)
    assert cfg == load_config(path)
    assert f"output/{name}" == cfg.OUTPUT_DIR
