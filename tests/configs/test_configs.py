"""Every config of the folder: its model builds, and is as large as it should be."""

import importlib.util
import math
import re
from pathlib import Path

import pytest

from codetr_d2.engine import check_config, load_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "_base_")
# One of each kind that a CPU trains in seconds: family, backbone, and the number of auxiliary heads.
STEPS = [
    "co_deformable_detr_mask_r50_1x_coco",
    "co_deformable_detr_swin_tiny_1x_coco",
    "deformable_detr_r50_1x_coco",
    "co_dino_5scale_lsj_r50_1x_coco",
    "co_conditional_detr_dc5_r50_3x_coco",
    "co_dab_detr_k1_atss_dc5_r50_3x_coco",
]
WITHOUT_PUBLISHED_MODEL = ("quick_start", "conditional_detr", "dab_detr")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("check_configs", ROOT / "tools" / "check_configs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def read(monkeypatch):
    """A function that reads a config, without the weights to start from."""
    monkeypatch.chdir(ROOT)
    return lambda path: load_config(str(path), ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"])


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_number_of_parameters(tool, read, path):
    cfg = read(path)
    if path.parent.name != "quick_start":  # whose datasets are not there before it has run
        check_config(cfg)
    model = tool.build_without_weights(cfg)
    assert all(parameter.is_meta for parameter in model.parameters())
    counts = tool.count_parameters(model)
    assert counts == tool.COUNTS.get(path.stem, counts)
    assert (path.stem in tool.COUNTS) == (path.parent.name not in WITHOUT_PUBLISHED_MODEL)
    if "_dc5_" in path.stem:  # its last stage is dilated instead of strided
        assert model.strides == [16] and model.backbone.res5[0].conv2.dilation == (2, 2)
    untrained = {".".join(name.split(".")[:2]) for name, p in model.named_parameters() if not p.requires_grad}
    if cfg.MODEL.CODETR.IN_FEATURES == ["stride16"]:  # timm's EfficientNet has layers behind it
        untrained -= {"backbone.model"}
    # As published: of a ResNet all but the stem and the first stage is trained, of other models everything.
    expected = {"backbone.stem", "backbone.res2"} if "_r50_" in path.stem else set()
    if cfg.MODEL.CODETR.LAMBDA2 == 0:
        expected |= {"auxiliary_heads.atss", "auxiliary_level.0", "auxiliary_level.1"}
    assert untrained == expected
    for part, _ in cfg.SOLVER.LR_MULTIPLIERS:
        assert any(part in name for name, _ in model.named_parameters()), part


def test_every_config_is_in_the_model_zoo():
    page = (ROOT / "MODEL_ZOO.md").read_text()
    for path in CONFIGS:
        if path.parent.name != "quick_start":
            assert f"]({path.relative_to(ROOT)})" in page, path.name
    for link in re.findall(r"\]\((configs/[^)]*)\)", page):
        assert (ROOT / link).is_file(), link


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem in STEPS], ids=lambda path: path.stem)
def test_training_step(tool, read, path):
    cfg = read(path)
    losses = tool.training_step(cfg)
    assert all(math.isfinite(loss) for loss in losses.values())
    assert ("loss_mask_roi" in losses) == cfg.MODEL.MASK_ON
    for name in ("roi", "atss"):
        is_there = name in cfg.MODEL.CODETR.AUX_HEADS
        assert (f"loss_cls_{name}" in losses) == (f"loss_cls_aux_{name}" in losses) == is_there
