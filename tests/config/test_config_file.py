import os
import shutil

import pytest
import torch

from codetr_d2.config.config_file import save_config
from codetr_d2.config.output_dir import check_training_data, training_data
from codetr_d2.config.zoo import zoo_folder
from codetr_d2.engine import check_config, check_output_dir, load_config
from codetr_d2.errors import InputError

ZOO_NAME = "co_dino/co_dino_5scale_r50_1x_coco.yaml"


@pytest.fixture
def write(tmp_path):
    def write(text, name="config.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_bases_files_and_command_line_override_each_other(write):
    write("SOLVER: {BASE_LR: 1, MAX_ITER: 5}\nMODEL: {CODETR: {AUX_HEADS: [atss]}}", "base.yaml")
    path = write("_BASE_: base.yaml\nSOLVER: {MAX_ITER: 6, IMS_PER_BATCH: 3, WEIGHT_DECAY: 1e-4}\nDATASETS:\n")
    cfg = load_config(path, ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.STEPS", "(3,)", "SOLVER.GAMMA", "1"])
    solver = cfg.SOLVER
    assert (solver.BASE_LR, solver.MAX_ITER, solver.IMS_PER_BATCH, solver.STEPS) == (1.0, 6, 4, (3,))
    assert isinstance(solver.BASE_LR, float) and isinstance(solver.GAMMA, float) and solver.WEIGHT_DECAY == 1e-4
    assert cfg.MODEL.CODETR.AUX_HEADS == ["atss"]


def test_a_file_comes_before_the_model_zoo(write, tmp_path, monkeypatch):
    """For a config and for its _BASE_, from a folder that is none of the project's."""
    monkeypatch.chdir(tmp_path)
    assert load_config(ZOO_NAME) == load_config(os.path.join(zoo_folder(), ZOO_NAME))
    path = write(f"_BASE_: {ZOO_NAME}\nSOLVER: {{IMS_PER_BATCH: 3}}")
    cfg = load_config(path)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.MODEL.CODETR.QUERY_HEAD) == (3, "CoDINOHead")
    (tmp_path / ZOO_NAME).parent.mkdir()
    write("MODEL: {CODETR: {NUM_CLASSES: 7}}", ZOO_NAME)
    assert load_config(ZOO_NAME).MODEL.CODETR.NUM_CLASSES == load_config(path).MODEL.CODETR.NUM_CLASSES == 7


def test_a_config_in_neither_place_names_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        load_config("configs/co_dino/co_dino_5scale_r50_1x_coco.yaml")
    message = str(error.value)
    assert message.startswith("configs/co_dino/") and f"none in {tmp_path}," in message
    assert f"model zoo ({zoo_folder()})" in message and f": {ZOO_NAME}" in message
    with pytest.raises(InputError, match="^/no/such/file.yaml: cannot read this config file: it does not exist$"):
        load_config("/no/such/file.yaml")


@pytest.mark.parametrize(
    "text, opts, message",
    [
        ("MODEL: {CODETR: {AUX_HEDS: []}}", [], r"config\.yaml: unknown option MODEL\.CODETR\.AUX_HEDS.*\.AUX_HEADS\?"),
        ("MODEL: {CODETER: {NUM_CLASSES: 3}}", [], r"config\.yaml.*MODEL\.CODETER\.NUM_CLASSES.*CODETR\.NUM_CLASSES"),
        ("_BASE_: base.yaml", [], r"base\.yaml: cannot read.*_BASE_ of .*config\.yaml"),
        (
            "_BASE_: co_dino/co_dino_r50.yaml",
            [],
            r"co_dino_r50\.yaml: cannot.*Near to it: co_dino/co_dino_5.*_BASE_",
        ),
        ("_BASE_: config.yaml", [], r"config\.yaml: its _BASE_ leads back"),
        ("MODEL: 3", [], r"config\.yaml: MODEL is a section"),
        ("MODEL: {CODETR: {NUM_CLASSES: three}}", [], r"NUM_CLASSES must be a int, like 80; got 'three'"),
        ("SOLVER: {BASE_LR: fast}", [], r"SOLVER\.BASE_LR must be a float.*'fast'"),
        ("SOLVER: {BASE_LR: {A: 1}}", [], r"SOLVER\.BASE_LR must be a float"),
        ("- a\n- b", [], r"config\.yaml: a config must be a mapping"),
        ("MODEL: [", [], r"config\.yaml: not valid YAML.*line"),
        ("MODEL: !!python/object/apply:os.getcwd []", [], r"not valid YAML"),
        ("", ["SOLVER.MAXITER", "3"], r"command line: unknown option SOLVER\.MAXITER; did you mean SOLVER\.MAX_ITER\?"),
        ("", ["SOLVER.MAX_ITER"], r"SOLVER\.MAX_ITER has no value"),
        ("", ["SOLVER.MAX_ITER", "3", "--resume"], r"--resume: flags must stand before"),
        ("", ["SOLVER.MAX_ITER", "many"], r"command line: SOLVER\.MAX_ITER must be a int"),
        ("SOLVER: {MAX_EPOCHS: 12}", ["SOLVER.MAX_ITER", "20"], r"line: SOLVER\.MAX_ITER has no .* 12; .*EPOCHS 0 too"),
        ("SOLVER: {MAX_EPOCHS: 12}", ["SOLVER.STEPS", "(9,)"], r"line: SOLVER\.STEPS has no effect.*MAX_EPOCHS 0 too"),
        (
            "SOLVER: {STEPS_EPOCHS: [9]}",
            [],
            r"config\.yaml: SOLVER\.STEPS_EPOCHS has no .*MAX_EPOCHS is 0; set that too",
        ),
    ],
)
def test_faulty_configs_are_named_with_a_way_out(write, text, opts, message):
    with pytest.raises(InputError, match=message) as error:
        load_config(write(text), opts)
    assert "\n" not in str(error.value)


def test_the_kind_of_schedule_that_is_set_last_counts(write):
    path = write("SOLVER: {MAX_ITER: 500, STEPS: [400]}")
    assert load_config(path, ["SOLVER.MAX_EPOCHS", "3", "SOLVER.STEPS_EPOCHS", "(2,)"]).SOLVER.MAX_EPOCHS == 3
    path = write("SOLVER: {MAX_EPOCHS: 12, STEPS_EPOCHS: [11]}")
    assert load_config(path, ["SOLVER.MAX_EPOCHS", "0", "SOLVER.MAX_ITER", "20"]).SOLVER.MAX_ITER == 20
    write("SOLVER: {MAX_EPOCHS: 12, STEPS_EPOCHS: [11], MAX_ITER: 88716, STEPS: [81322]}")  # as a run writes it
    assert load_config(path).SOLVER.MAX_EPOCHS == 12


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: cannot read"):
        load_config(str(tmp_path / "none.yaml"))


CODETR = [
    *("MODEL.META_ARCHITECTURE", "CoDETR", "MODEL.RESNETS.OUT_FEATURES", "['res3', 'res4', 'res5']"),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
]
JITTER = ["INPUT.LARGE_SCALE_JITTER.ENABLED", "True", "MODEL.CODETR.CANVAS_SIZE", "64", "INPUT.MAX_SIZE_TEST", "64"]
EACH_WITH_TWO_HEADS = ["MODEL.CODETR.ENCODER.NUM_HEADS", "2", "MODEL.CODETR.DECODER.NUM_HEADS", "2"]
CROP = ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE"]
CO_ROI = ["MODEL.ROI_HEADS.NAME", "CoROIHeads"]
DINO = ["MODEL.CODETR.QUERY_HEAD", "CoDINOHead"]
COPY_PASTE = ["INPUT.COPY_PASTE.ENABLED", "True"]


SWIN = ["MODEL.BACKBONE.NAME", "build_swin_backbone", "MODEL.CODETR.IN_FEATURES", "['p1', 'p2', 'p3']"]
VIT = [
    *("MODEL.BACKBONE.NAME", "build_eva02_pyramid_backbone"),
    *("MODEL.CODETR.IN_FEATURES", "['p2', 'p3', 'p4', 'p5']", "MODEL.CODETR.NECK", ""),
]


@pytest.mark.parametrize(
    "opts, processes, message",
    [
        (["MODEL.CODETR.AUX_HEADS", "['roi', 'yolo']"], 1, r"AUX_HEADS is 'yolo'; it may be: .*atss"),
        (["MODEL.CODETR.QUERY_HEAD", "DETR"], 1, r"QUERY_HEAD.*CoDeformableDETRHead"),
        (
            ["MODEL.CODETR.QUERY_HEAD", "DABDETRHead"],
            1,
            r"FEATURE_LEVELS is 4, but DABDETRHead .*set it to 1.*one feature$",
        ),
        (["MODEL.CODETR.EVAL_HEAD", "atss", "MODEL.CODETR.AUX_HEADS", "['roi']"], 1, r"EVAL_HEAD.*may be: detr, roi$"),
        (["MODEL.CODETR.POSITIVE_QUERIES.PADDING", "zeros"], 1, r"PADDING.*negatives, mask"),
        (["MODEL.CODETR.EMBED_DIM", "100"], 1, r"EMBED_DIM is 100.*ENCODER\.NUM_HEADS \(8\)"),
        (["MODEL.CODETR.NUM_CLASSES", "0"], 1, r"NUM_CLASSES is 0; it must be greater than 0"),
        (["SOLVER.IMS_PER_BATCH", "6"], 4, r"IMS_PER_BATCH is 6.*processes times SOLVER\.ACCUMULATE_STEPS \(4\)"),
        (["SOLVER.IMS_PER_BATCH", "8", "SOLVER.ACCUMULATE_STEPS", "3"], 1, r"IMS_PER_BATCH.*\(3\)"),
        (["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16"], 1, r"AMP\.DTYPE.*may be: bfloat16$"),
        (["SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.DECAY", "1.0"], 1, r"EMA\.DECAY is 1\.0"),
        (["SOLVER.LR_MULTIPLIERS", "['backbone', 0.1]"], 1, r"LR_MULTIPLIERS has the entry 'backbone'"),
        (["SOLVER.STEPS", "(5, 3)"], 1, r"SOLVER\.STEPS is \(5, 3\); it must rise"),
        (["SOLVER.STEPS", "(6,)"], 1, r"SOLVER\.STEPS.*SOLVER\.MAX_ITER \(6\)"),
        (["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "total"], 1, r"CLIP_TYPE.*full_model, norm, value"),
        (["DATALOADER.SAMPLER_TRAIN", "Random"], 1, r"SAMPLER_TRAIN.*RepeatFactorTrainingSampler"),
        (["MODEL.CODETR.POSITIVE_QUERIES.MIN_PER_HEAD", "0"], 1, r"MIN_PER_HEAD is 0; it must be greater"),
        (["MODEL.META_ARCHITECTURE", "DETR"], 1, r"META_ARCHITECTURE is 'DETR'; it may be: .*CoDETR"),
        (
            ["MODEL.BACKBONE.NAME", "resnet"],
            1,
            r"BACKBONE\.NAME is 'resnet'.*build_resnet_backbone.*build_timm_backbone",
        ),
        (["MODEL.ROI_HEADS.NAME", "ROI"], 1, r"ROI_HEADS\.NAME is 'ROI'.*CoROIHeads"),
        (["MODEL.CODETR.IN_FEATURES", "['res9']"], 1, r"IN_FEATURES is 'res9'; it may be: res3, res4, res5"),
        ([*SWIN, "MODEL.CODETR.IN_FEATURES", "['p4']"], 1, r"IN_FEATURES is 'p4'; it may be: p0, p1, p2, p3$"),
        ([*SWIN, "MODEL.SWIN.NUM_HEADS", "[3, 6]"], 1, r"SWIN\.NUM_HEADS is \[3, 6\].*each of MODEL\.SWIN\.DEPTHS"),
        ([*SWIN, "MODEL.SWIN.EMBED_DIM", "100"], 1, r"SWIN\.EMBED_DIM times 1 is 100.*NUM_HEADS \(3\)"),
        ([*SWIN, "MODEL.SWIN.DROP_PATH_RATE", "1.0"], 1, r"SWIN\.DROP_PATH_RATE is 1\.0; .*less than 1"),
        ([*SWIN, "MODEL.SWIN.DEPTHS", "[2, 0, 2, 2]"], 1, r"SWIN\.DEPTHS.*greater than 0"),
        ([*SWIN, "SOLVER.LAYER_DECAY", "0.8"], 1, r"LAYER_DECAY is 0\.8, but.*build_swin_backbone has no ViT blocks"),
        (["SOLVER.LAYER_DECAY", "1.5"], 1, r"LAYER_DECAY is 1\.5; it must be greater than 0 and at most 1"),
        ([*VIT, "MODEL.CODETR.IN_FEATURES", "['p1']"], 1, r"IN_FEATURES is 'p1'; it may be: p2, p3, p4, p5, p6$"),
        ([*VIT, "MODEL.EVA02.NUM_HEADS", "10"], 1, r"EVA02\.EMBED_DIM is 1024.*EVA02\.NUM_HEADS \(40\)"),
        ([*VIT, "MODEL.EVA02.PATCH_SIZE", "14"], 1, r"EVA02\.PATCH_SIZE is 14"),
        ([*VIT, "MODEL.EVA02.PRETRAIN_IMAGE_SIZE", "500"], 1, r"PRETRAIN_IMAGE_SIZE is 500.*PATCH_SIZE \(16\)"),
        ([*VIT, "MODEL.EVA02.GLOBAL_BLOCKS", "[3, 24]"], 1, r"GLOBAL_BLOCKS has 24.*DEPTH - 1 \(23\)"),
        ([*VIT, "MODEL.EVA02.DROP_PATH_RATE", "-0.1"], 1, r"EVA02\.DROP_PATH_RATE is -0\.1"),
        ([*VIT, "MODEL.EVA02.WINDOW_SIZE", "0"], 1, r"EVA02\.WINDOW_SIZE is 0; it must be greater than 0"),
        (
            [*VIT, "MODEL.EVA02.IMAGE_SIZE", "1000", "MODEL.CODETR.CANVAS_SIZE", "1000"],
            1,
            r"IMAGE_SIZE is 1000.*\(32\)",
        ),
        ([*VIT, "MODEL.EVA02.IMAGE_SIZE", "1024"], 1, r"IMAGE_SIZE is 1024; it must be 0, or .*CANVAS_SIZE \(0\)"),
        (["MODEL.CODETR.NUM_FEATURE_LEVELS", "2"], 1, r"IN_FEATURES names 3 features.*NUM_FEATURE_LEVELS \(2\)"),
        (["MODEL.CODETR.IN_FEATURES", "[]"], 1, r"IN_FEATURES names 0 features"),
        (["MODEL.DEVICE", "gpu", "SOLVER.AMP.ENABLED", "True"], 1, r"MODEL\.DEVICE is 'gpu'; it may be cpu or cuda"),
        (["TEST.AUG.ENABLED", "True"], 1, r"TEST\.AUG\.ENABLED is True, which has no effect.*Leave it at False"),
        (["MODEL.META_ARCHITECTURE", "PanopticFPN"], 1, r"META_ARCHITECTURE is 'PanopticFPN'; it may be"),
        (["MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator"], 1, r"GENERATOR\.NAME is 'Rotated.*; it may be"),
        (["MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", "True", *CO_ROI], 1, r"TRAIN_ON_PRED_BOXES.*no such training"),
        (["MODEL.BACKBONE.FREEZE_AT", "-1"], 1, r"FREEZE_AT is -1; it must be at least 0"),
        (["MODEL.PIXEL_MEAN", "[0.5]"], 1, r"PIXEL_MEAN is \[0\.5\].*FORMAT BGR needs 3 entries in both"),
        (["INPUT.FORMAT", "L", "MODEL.PIXEL_STD", "[0.5]"], 1, r"PIXEL_STD is \[0\.5\].*FORMAT L needs 1 or 3 entries"),
        (["SOLVER.WEIGHT_DECAY_NORM", "much"], 1, r"WEIGHT_DECAY_NORM is 'much'; it must be at least 0, or None"),
        (["SOLVER.WEIGHT_DECAY_BIAS", "-0.1"], 1, r"WEIGHT_DECAY_BIAS is -0\.1; it must be at least 0, or None"),
        (
            ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR_END", "1."],
            1,
            r"BASE_LR_END is 1\.0; it must be from 0 to 0\.01",
        ),
        (["SOLVER.REFERENCE_BATCH_SIZE", "-1"], 1, r"REFERENCE_BATCH_SIZE is -1; it must be at least 0"),
        (
            ["SOLVER.REFERENCE_BATCH_SIZE", "16", "SOLVER.REFERENCE_WORLD_SIZE", "8"],
            1,
            r"REFERENCE_BATCH_SIZE is 16 and SOLVER\.REFERENCE_WORLD_SIZE is 8; each scales .*set one of them to 0",
        ),
        (["INPUT.FORMAT", "XYZ"], 1, r"INPUT\.FORMAT is 'XYZ'.*RGB, BGR"),
        (["INPUT.RANDOM_FLIP", "both"], 1, r"INPUT\.RANDOM_FLIP is 'both'.*none, horizontal, vertical"),
        (["DATALOADER.NUM_WORKERS", "-1"], 1, r"NUM_WORKERS is -1"),
        (["DATASETS.TRAIN", "()"], 1, r"DATASETS\.TRAIN is empty"),
        (["DATASETS.TRAIN", "('none',)"], 1, r"DATASETS\.TRAIN has 'none'.*COCO_JSON describes tiny_train, tiny_test"),
        (["DATASETS.TEST", "('tiny_test', 'none')"], 1, r"DATASETS\.TEST has 'none'.*describes tiny_train, tiny_test"),
        (["DATASETS.COCO_JSON", "['a', 'b', 'c']"], 1, r"DATASETS\.COCO_JSON: 'a' is not a \[name"),
        ([*JITTER, "MODEL.CODETR.CANVAS_SIZE", "0"], 1, r"JITTER\.ENABLED needs .*MODEL\.CODETR\.CANVAS_SIZE"),
        ([*JITTER, "INPUT.LARGE_SCALE_JITTER.MIN_SCALE", "0"], 1, r"MIN_SCALE is 0.*greater than 0"),
        ([*JITTER, "INPUT.LARGE_SCALE_JITTER.MIN_SCALE", "3"], 1, r"MIN_SCALE is 3.*MAX_SCALE is 2.*at most MAX_SCALE"),
        ([*JITTER, "INPUT.CROP.ENABLED", "True"], 1, r"CROP\.ENABLED and INPUT\.LARGE.*exclude each other"),
        (["INPUT.COPY_PASTE.ENABLED", "True"], 1, r"COPY_PASTE\.ENABLED needs .*LARGE_SCALE_JITTER\.ENABLED True"),
        ([*JITTER, *COPY_PASTE, "INPUT.COPY_PASTE.MAX_NUM_PASTED", "0"], 1, r"MAX_NUM_PASTED is 0"),
        (["MODEL.MASK_ON", "True", "MODEL.CODETR.MASK_HEAD", "fcn"], 1, r"MASK_HEAD is 'fcn'; it may be: roi, refine"),
        (
            ["MODEL.MASK_ON", "True", "MODEL.CODETR.AUX_HEADS", "['atss']"],
            1,
            r'MASK_HEAD is "roi".*add "roi" to MODEL\.CODETR\.AUX_HEADS.*"refine"',
        ),
        (["MODEL.MASK_ON", "True", "INPUT.MASK_FORMAT", "rle"], 1, r"MASK_FORMAT is 'rle'.*polygon, bitmask"),
        (["MODEL.CODETR.NECK", "FPN"], 1, r"NECK is 'FPN'; it may be: ChannelMapper"),
        (["MODEL.CODETR.ENCODER.DROPOUT", "1.5"], 1, r"ENCODER\.DROPOUT is 1\.5; it must be from 0 to 1"),
        (["MODEL.CODETR.LAMBDA1", "-1"], 1, r"LAMBDA1 is -1\.0; it must be at least 0"),
        (["MODEL.CODETR.CANVAS_SIZE", "-1"], 1, r"CANVAS_SIZE is -1; it must be at least 0"),
        (["MODEL.CODETR.SOFT_NMS_THRESH", "2"], 1, r"SOFT_NMS_THRESH is 2\.0; it must be from 0 to 1"),
        ([*DINO, "MODEL.CODETR.DENOISING.NUM_QUERIES", "-3"], 1, r"DENOISING\.NUM_QUERIES is -3"),
        ([*DINO, "MODEL.CODETR.DENOISING.LABEL_NOISE", "3"], 1, r"LABEL_NOISE is 3\.0; it must be from 0 to 1"),
        (
            [*("MODEL.CODETR.EMBED_DIM", "2"), *EACH_WITH_TWO_HEADS],
            1,
            r"EMBED_DIM is 2, which .* \(4\)",
        ),
        (["MODEL.ATSS.TOPK", "0"], 1, r"ATSS\.TOPK is 0; it must be greater than 0"),
        (["MODEL.ATSS.BBOX_REG_WEIGHTS", "(1., 1.)"], 1, r"BBOX_REG_WEIGHTS is .*four entries"),
        (["MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", "fcn"], 1, r"ROI_MASK_HEAD\.NAME is 'fcn'.*MaskRCNN"),
        (["MODEL.KEYPOINT_ON", "True"], 1, r"KEYPOINT_ON is True"),
        ([*SWIN, "MODEL.SWIN.DEPTHS", "[2, 2.5, 2, 2]"], 1, r"SWIN\.DEPTHS.*whole numbers"),
        (["MODEL.BACKBONE.NAME", "build_swin_fpn_backbone"], 1, r"FPN\.IN_FEATURES is empty"),
        (["INPUT.MIN_SIZE_TRAIN", "()"], 1, r"MIN_SIZE_TRAIN is \(\); it must be a list"),
        (["INPUT.MIN_SIZE_TRAIN", "(-5,)"], 1, r"MIN_SIZE_TRAIN is \(-5,\)"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "all"], 1, r"MIN_SIZE_TRAIN_SAMPLING is 'all'.*choice, range"),
        (
            ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", "(1, 2, 3)"],
            1,
            r"MIN_SIZE_TRAIN is .*least and the largest",
        ),
        (["INPUT.MAX_SIZE_TRAIN", "0"], 1, r"MAX_SIZE_TRAIN is 0"),
        (["INPUT.MIN_SIZE_TEST", "-1"], 1, r"MIN_SIZE_TEST is -1"),
        (["MODEL.CODETR.CANVAS_SIZE", "64"], 1, r"MAX_SIZE_TEST is 1333;.*CANVAS_SIZE \(64\): set it to that"),
        (["MODEL.CODETR.CANVAS_SIZE", "1000", "INPUT.MAX_SIZE_TEST", "1000"], 1, r"MAX_SIZE_TRAIN is 1333;.*\(1000\)"),
        ([*CROP, "relative", "INPUT.CROP.SIZE", "[384, 600]"], 1, r"CROP\.SIZE is \[384, 600\];.*shares"),
        ([*CROP, "absolute", "INPUT.CROP.SIZE", "[384]"], 1, r"CROP\.SIZE is \[384\];.*two numbers"),
        ([*CROP, "absolute_range", "INPUT.CROP.SIZE", "[600, 384]"], 1, r"CROP\.SIZE is .*least and the largest"),
        (["MODEL.MS_DEFORM_ATTN", "cuda"], 1, r"MS_DEFORM_ATTN is 'cuda'; it may be: auto, cpp, triton, eager"),
        (["MODEL.WEIGHTS", "none.pth"], 1, r"MODEL\.WEIGHTS: there is no file none\.pth"),
    ],
)
def test_values_are_checked(config_file, opts, processes, message):
    cfg = load_config(str(config_file), [*CODETR, *opts])
    with pytest.raises(InputError, match=message):
        check_config(cfg, processes)


def test_good_values_pass(config_file):
    opts = [*CODETR, "MODEL.CODETR.AUX_HEADS", "['roi', 'roi']"]
    check_config(load_config(str(config_file), [*opts, "MODEL.CODETR.EVAL_HEAD", "roi2"]), 2)
    check_config(load_config(str(config_file), [*opts, "MODEL.CODETR.AUX_HEADS", "[]"]))
    check_config(load_config(str(config_file), [*CODETR, "MODEL.MS_DEFORM_ATTN", "triton"]))
    check_config(load_config(str(config_file), [*CODETR, *SWIN]))
    check_config(load_config(str(config_file), [*CODETR, "INPUT.FORMAT", "L"]))
    grey = ["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", "[110.]", "MODEL.PIXEL_STD", "[58.]"]
    check_config(load_config(str(config_file), [*CODETR, *grey, "SOLVER.WEIGHT_DECAY_NORM", "0"]))
    check_config(load_config(str(config_file), [*CODETR, *VIT, "SOLVER.LAYER_DECAY", "0.8"]))
    canvas = ["MODEL.EVA02.IMAGE_SIZE", "1536", "MODEL.CODETR.CANVAS_SIZE", "1536"]
    check_config(load_config(str(config_file), [*CODETR, *CROP, "relative_range", "INPUT.CROP.SIZE", "[0.5, 1]"]))
    check_config(load_config(str(config_file), [*CODETR, *VIT, *canvas]))
    check_config(load_config(str(config_file), [*opts, *JITTER, *COPY_PASTE]))


def test_heads_for_masks_pass(config_file):
    opts = [*CODETR, "MODEL.MASK_ON", "True"]
    check_config(load_config(str(config_file), opts))
    opts += ["MODEL.CODETR.AUX_HEADS", "[]", "MODEL.CODETR.MASK_HEAD", "refine"]
    check_config(load_config(str(config_file), opts))


def test_weights_are_not_needed_where_a_run_is_resumed(config_file, tmp_path):
    cfg = load_config(str(config_file), ["MODEL.WEIGHTS", "none.pth"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000001.pth")
    check_config(cfg, resume=True)
    with pytest.raises(InputError, match="none.pth"):
        check_config(cfg, resume=False)


def test_evaluation_needs_weights_and_test_data_alone(config_file, tmp_path):
    def check(*opts, resume=False):
        check_config(load_config(str(config_file), opts), resume=resume, eval_only=True)

    with pytest.raises(InputError, match=r"--eval-only needs the weights.*MODEL\.WEIGHTS .*, or --resume"):
        check()
    with pytest.raises(InputError, match=r"--eval-only needs the weights.*no checkpoint in OUTPUT_DIR \(.*run\)"):
        check(resume=True)
    with pytest.raises(InputError, match="no file none.pth"):
        check("MODEL.WEIGHTS", "none.pth")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000001.pth")
    check(resume=True)

    weights = ("MODEL.WEIGHTS", str(config_file))
    check(*weights, "DATASETS.TRAIN", "('none',)", "SOLVER.IMS_PER_BATCH", "0")
    with pytest.raises(InputError, match=r"DATASETS\.TEST is empty"):
        check(*weights, "DATASETS.TEST", "()")
    with pytest.raises(InputError, match=r"DATASETS\.TEST has 'none'"):
        check(*weights, "DATASETS.TEST", "('tiny_test', 'none')")


@pytest.fixture
def folder_of_run(config_file, tmp_path):
    """An output folder with a checkpoint, and a function (KEY, VALUE, ...) -> config for it."""
    cfg = load_config(str(config_file))
    check_output_dir(cfg, resume=False)
    save_config(cfg)
    torch.save({}, tmp_path / "run" / "model_0000001.pth")
    return lambda *opts: load_config(str(config_file), opts)


def test_a_run_is_not_overwritten(folder_of_run):
    with pytest.raises(InputError, match="already holds a run.*--resume.*OUTPUT_DIR"):
        check_output_dir(folder_of_run(), resume=False)
    check_output_dir(folder_of_run(), resume=False, eval_only=True)
    check_output_dir(folder_of_run("SOLVER.MAX_ITER", "9", "SOLVER.BASE_LR", "0.1"), resume=True)


def test_logs_alone_are_a_run_too(config_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text("")
    check_output_dir(load_config(str(config_file)), resume=False)
    (tmp_path / "run" / "metrics.json").write_text('{"iteration": 19}')
    with pytest.raises(InputError, match="already holds a run"):
        check_output_dir(load_config(str(config_file)), resume=False)


@pytest.mark.parametrize(
    "opts, key",
    [
        (["MODEL.CODETR.NUM_QUERIES", "7"], r"MODEL\.CODETR\.NUM_QUERIES \(300 there, 7 now\)"),
        (["DATASETS.TRAIN", "('other',)"], r"DATASETS\.TRAIN"),
    ],
)
def test_another_config_is_not_resumed(folder_of_run, opts, key):
    with pytest.raises(InputError, match=key):
        check_output_dir(folder_of_run(*opts), resume=True)


def test_a_schedule_in_epochs_keeps_its_batch_size(folder_of_run):
    check_output_dir(folder_of_run("SOLVER.IMS_PER_BATCH", "2"), resume=True)
    with pytest.raises(InputError, match=r"IMS_PER_BATCH \(4 there, 2 now\).*MAX_EPOCHS.*set the size as it was"):
        check_output_dir(folder_of_run("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_EPOCHS", "2"), resume=True)


def test_what_else_has_changed_is_said(folder_of_run, caplog):
    check_output_dir(folder_of_run("SOLVER.BASE_LR", "0.1", "OUTPUT_DIR", folder_of_run().OUTPUT_DIR), resume=True)
    assert [record.message for record in caplog.records] == [
        "The resumed run goes on with other options than before: SOLVER.BASE_LR (0.01 there, 0.1 now)"
    ]


def test_data_are_the_same_wherever_they_lie(folder_of_run, coco_json, tmp_path):
    cfg = folder_of_run()
    before = training_data(cfg, 14)
    shutil.copy(coco_json[0][2], tmp_path / "moved.json")
    cfg.DATASETS.COCO_JSON = [["tiny_train", str(tmp_path), str(tmp_path / "moved.json")], coco_json[1]]
    check_training_data(cfg, before, training_data(cfg, 14))
    for other in (training_data(cfg, 13), before | {"annotation_files": {"tiny_train": "another digest"}}):
        with pytest.raises(
            InputError, match=r"DATASETS\.TRAIN: tiny_train is not what the run in .*run was trained on"
        ):
            check_training_data(cfg, before, other)


def test_options_that_do_not_change_the_weights_may_change(folder_of_run):
    opts = ["MODEL.CODETR.ACTIVATION_CHECKPOINTING", "True", "MODEL.WEIGHTS", "x.pth", "MODEL.DEVICE", "cuda"]
    check_output_dir(folder_of_run(*opts), resume=True)


def test_a_file_is_no_folder(config_file, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="OUTPUT_DIR: cannot use"):
        check_output_dir(load_config(str(config_file)), resume=False)


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.yaml").write_text("OUTPUT_DIR: ~/run\nDATASETS: {COCO_JSON: [[a, ~/im, ~/a.json]]}\n")
    cfg = load_config("~/config.yaml", ["MODEL.WEIGHTS", "~/x.pth?matching_heuristics=True"])
    assert cfg.OUTPUT_DIR == f"{tmp_path}/run"
    assert cfg.MODEL.WEIGHTS == f"{tmp_path}/x.pth?matching_heuristics=True"
    assert cfg.DATASETS.COCO_JSON == [["a", f"{tmp_path}/im", f"{tmp_path}/a.json"]]
    check_output_dir(cfg, resume=False)
    save_config(cfg)
    assert load_config(f"{tmp_path}/run/config.yaml").OUTPUT_DIR == cfg.OUTPUT_DIR
    assert "~" not in (tmp_path / "run" / "config.yaml").read_text()


def test_a_folder_below_a_file_or_of_the_system(config_file, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "run", "/proc", "/proc/run"):
        with pytest.raises(InputError, match=f"{folder}.*: (Not a directory|No such file|Permission|Operation not)"):
            check_output_dir(load_config(str(config_file), ["OUTPUT_DIR", str(folder)]), resume=False)
