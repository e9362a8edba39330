import copy
import logging

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.solver import build_lr_scheduler, get_default_optimizer_params
from torch import nn

from codetr_d2 import add_codetr_config
from codetr_d2.engine.optimizer import (
    _fused_step_divides,
    build_optimizer,
    clip_full_model,
    schedule_in_iterations,
)
from codetr_d2.modeling.backbones import Eva02


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.SOLVER.BASE_LR = 0.1
    cfg.SOLVER.WEIGHT_DECAY = 0.01
    return cfg


def make_model():
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "backbone_norm": nn.LayerNorm(2)})
    model["norm"].bias.requires_grad_(False)
    return model


def test_learning_rates_follow_the_first_multiplier_that_fits(cfg):
    cfg.SOLVER.LR_MULTIPLIERS = [["backbone.bias", 0.5], ["backbone", 0.1]]
    model = make_model()
    optimizer = build_optimizer(cfg, model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {
        "backbone.weight": pytest.approx(0.01),
        "backbone.bias": pytest.approx(0.05),
        "norm.weight": pytest.approx(0.1),
        "backbone_norm.weight": pytest.approx(0.01),
        "backbone_norm.bias": pytest.approx(0.01),
    }
    assert isinstance(optimizer, torch.optim.AdamW)
    assert len(optimizer.param_groups) == 3
    assert all(group["weight_decay"] == 0.01 for group in optimizer.param_groups)


class Vit(nn.Module):
    """The names of a model with a ViT of four blocks, and one parameter of each kind."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.net = Eva02(8, 4, 2, 4, 2, global_blocks=[3], pretrain_image_size=8)
        self.backbone.p4 = nn.Conv2d(8, 8, 1)
        self.query_head = nn.Module()
        self.query_head.norm = nn.LayerNorm(8)
        self.query_head.level_embeds = nn.Parameter(torch.zeros(2, 8))


def test_layer_decay(cfg):
    cfg.MODEL.BACKBONE.NAME = "build_eva02_pyramid_backbone"
    cfg.MODEL.EVA02.DEPTH = 4
    cfg.SOLVER.LAYER_DECAY = 0.5
    cfg.SOLVER.LR_MULTIPLIERS = [["query_head", 0.1]]
    model = Vit()
    groups = build_optimizer(cfg, model).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[p]: group["lr"] / 0.1 for group in groups for p in group["params"]}
    decays = {names[p]: group["weight_decay"] for group in groups for p in group["params"]}
    assert rates.keys() == set(names.values())

    for name, factor in {
        "backbone.net.patch_embed.proj.weight": 1 / 32,
        "backbone.net.pos_embed": 1 / 32,
        "backbone.net.blocks.0.attn.q_bias": 1 / 16,
        "backbone.net.blocks.1.mlp.w1.weight": 1 / 8,
        "backbone.net.blocks.3.norm1.weight": 1 / 2,
        "backbone.net.out_norm.weight": 1,
        "backbone.p4.weight": 1,
        "query_head.level_embeds": 0.1,
    }.items():
        assert rates[name] == pytest.approx(factor), name

    decayed = {name for name, decay in decays.items() if decay == 0.01}
    matrices = {name for name, p in model.named_parameters() if name.endswith("weight") and p.ndim > 1}
    assert decayed == matrices | {"query_head.level_embeds", "backbone.net.pos_embed"}
    assert all(decay in (0.0, 0.01) for decay in decays.values())


BIASES = ("backbone.bias", "backbone_norm.bias")


def options_by_name(cfg, model, key):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group[key] for group in build_optimizer(cfg, model).param_groups for p in group["params"]}


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_norms_and_biases_have_the_weight_decay_that_is_theirs(cfg, layer_decay):
    cfg.MODEL.BACKBONE.NAME = "build_eva02_pyramid_backbone"
    cfg.SOLVER.LAYER_DECAY = layer_decay
    usual = 0.01 if layer_decay == 1 else 0.0
    norms = ("norm.weight", "backbone_norm.weight")
    assert set(options_by_name(cfg, make_model(), "weight_decay").values()) == {0.01, usual}
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.3
    decays = options_by_name(cfg, make_model(), "weight_decay")
    expected = dict.fromkeys((*norms, "backbone_norm.bias"), 0.3)
    assert decays == {"backbone.weight": 0.01, "backbone.bias": usual, **expected}
    cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.2
    decays = options_by_name(cfg, make_model(), "weight_decay")
    assert decays == {"backbone.weight": 0.01, **dict.fromkeys(norms, 0.3), **dict.fromkeys(BIASES, 0.2)}
    theirs = get_default_optimizer_params(make_model(), weight_decay=0.01, weight_decay_norm=0.3, weight_decay_bias=0.2)
    assert sorted((x["weight_decay"], len(x["params"])) for x in theirs) == [(0.01, 1), (0.2, 2), (0.3, 2)]


def test_biases_learn_faster_beside_the_multipliers(cfg):
    cfg.SOLVER.BIAS_LR_FACTOR = 2.0
    cfg.SOLVER.LR_MULTIPLIERS = [["backbone_norm", 0.1]]
    rates = options_by_name(cfg, make_model(), "lr")
    assert rates == {
        "backbone.weight": pytest.approx(0.1),
        "backbone.bias": pytest.approx(0.2),
        "norm.weight": pytest.approx(0.1),
        "backbone_norm.weight": pytest.approx(0.01),
        "backbone_norm.bias": pytest.approx(0.02),
    }


def test_a_multiplier_without_effect_is_reported(cfg, caplog):
    cfg.SOLVER.LR_MULTIPLIERS = [["bakbone", 0.1]]
    with caplog.at_level(logging.WARNING):
        build_optimizer(cfg, make_model())
    assert "bakbone" in caplog.text


@pytest.mark.parametrize("kernel", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_any_adamw_checkpoint_goes_on_as_it_would_have(cfg, kernel):
    """Two steps of torch's own, with any kernel, then two of ours: the weights of four steps of its plain loop."""
    cfg.SOLVER.LR_MULTIPLIERS = [["backbone", 0.1]]
    model, expected = make_model(), make_model()
    expected.load_state_dict(model.state_dict())

    def plain(model, **kernel):
        groups = [dict(x) for x in build_optimizer(cfg, model).param_groups]
        options = ("params", "lr", "weight_decay")
        return torch.optim.AdamW([{key: group[key] for key in options} for group in groups], **kernel)

    def steps(optimizer, model, numbers):
        for number in numbers:
            optimizer.zero_grad()
            sum((x * (i + number)).sin().sum() for i, x in enumerate(model.parameters())).backward()
            optimizer.step()

    steps(plain(expected, foreach=False), expected, range(4))
    before = plain(model, **kernel)
    steps(before, model, range(2))
    optimizer = build_optimizer(cfg, model)
    assert optimizer.defaults["fused"]
    optimizer.load_state_dict(before.state_dict())
    assert all(group["fused"] and not group["foreach"] for group in optimizer.param_groups)
    steps(optimizer, model, range(2, 4))
    for a, b in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("limit", [0.5, 1e3])
@pytest.mark.parametrize("in_the_step", [True, False])
def test_full_model_clipping_is_that_of_torch(cfg, norm_type, limit, in_the_step):
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = limit
    cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = norm_type
    model = make_model()
    expected = copy.deepcopy(model)
    optimizer = build_optimizer(cfg, model)
    expected_optimizer = build_optimizer(cfg, expected)
    if not in_the_step:  # as with a device that has no fused kernel
        optimizer = torch.optim.AdamW(optimizer.param_groups, fused=False, foreach=True)
    assert bool(optimizer.defaults["fused"]) == in_the_step
    for _ in range(3):
        for a, b in zip(model.parameters(), expected.parameters()):
            if a.requires_grad:
                a.grad = torch.randn(a.shape)
                b.grad = a.grad.clone()
        norm = clip_full_model(optimizer, cfg)
        optimizer.step()
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(expected.parameters(), limit, norm_type))
        expected_optimizer.step()
        for a, b in zip(model.parameters(), expected.parameters()):
            torch.testing.assert_close(a, b)
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad)


def test_a_fused_step_that_does_not_divide_is_found_out(cfg, monkeypatch):
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    _fused_step_divides.cache_clear()
    assert _fused_step_divides(torch.device("cpu"))
    step = torch.optim.AdamW.step

    def step_without(optimizer):
        vars(optimizer).pop("grad_scale", None)
        step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_without)
    _fused_step_divides.cache_clear()
    try:
        assert not _fused_step_divides(torch.device("cpu"))
        model = make_model()
        optimizer = build_optimizer(cfg, model)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 8.0) if parameter.requires_grad else None
        clip_full_model(optimizer, cfg)
        optimizer.step()
        moments = torch.cat([x["exp_avg"].flatten() for x in optimizer.state.values()])
        torch.testing.assert_close(moments.norm(), torch.tensor(0.05))
    finally:
        _fused_step_divides.cache_clear()


def test_without_clipping_the_gradient_stays(cfg):
    model = make_model()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    norm = clip_full_model(build_optimizer(cfg, model), cfg)
    assert all((p.grad == 100).all() for p in model.parameters())
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(norm, torch.tensor(100.0 * count**0.5))


@pytest.mark.parametrize("kind", ["value", "norm"])
def test_clipping_of_each_parameter_is_detectron2s(cfg, kind):
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.25
    model = make_model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    build_optimizer(cfg, model).step()
    gradient = model["backbone"].weight.grad
    torch.testing.assert_close(gradient.max() if kind == "value" else gradient.norm(), torch.tensor(0.25))


def test_epochs_become_iterations(cfg):
    cfg.SOLVER.IMS_PER_BATCH = 16
    cfg.SOLVER.MAX_EPOCHS = 12
    cfg.SOLVER.STEPS_EPOCHS = (11,)
    cfg.freeze()
    result = schedule_in_iterations(cfg, 118287)
    assert result.SOLVER.MAX_ITER == 88716  # 12 * 118287 / 16 = 88715.25
    assert result.SOLVER.STEPS == (81322,)  # 11 * 118287 / 16 = 81322.3
    assert cfg.SOLVER.MAX_ITER == 40000


def test_epochs_of_few_images_give_a_schedule_that_can_be_built(cfg):
    cfg.SOLVER.IMS_PER_BATCH = 16
    cfg.SOLVER.MAX_EPOCHS = 8
    cfg.SOLVER.STEPS_EPOCHS = (3, 4, 8)
    result = schedule_in_iterations(cfg, 4)
    assert (result.SOLVER.MAX_ITER, result.SOLVER.STEPS) == (2, (1,))
    result.SOLVER.WARMUP_ITERS = 0
    scheduler = build_lr_scheduler(result, build_optimizer(result, make_model()))
    assert scheduler.get_last_lr()[0] == pytest.approx(0.1)


def test_a_schedule_in_iterations_stays(cfg):
    assert schedule_in_iterations(cfg, 10) is cfg


def test_the_learning_rate_is_scaled_to_the_batch(cfg, caplog):
    """By hand: 0.1 for 16 images is 0.025 for 4 and 0.4 for 64."""
    cfg.SOLVER.LR_MULTIPLIERS = [["backbone", 0.1]]

    def rates(images, reference):
        cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_BATCH_SIZE = images, reference
        optimizer = build_optimizer(cfg, make_model())
        return sorted({group["lr"] for group in optimizer.param_groups}), optimizer.defaults["lr"]

    for images, reference, rate in ((4, 0, 0.1), (16, 16, 0.1), (4, 16, 0.025), (64, 16, 0.4)):
        groups, default = rates(images, reference)
        assert groups == pytest.approx([0.1 * rate, rate]) and default == pytest.approx(rate)
    with caplog.at_level(logging.INFO):
        rates(4, 16)
    assert (
        "The learning rate is 0.025: SOLVER.BASE_LR 0.1 for SOLVER.IMS_PER_BATCH 4 in place of 16 images" in caplog.text
    )


def test_a_cosine_ends_at_a_scaled_rate_too(cfg):
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.BASE_LR_END = "WarmupCosineLR", 0.01
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS = 10, 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_BATCH_SIZE = 4, 16
    optimizer = build_optimizer(cfg, make_model())
    scheduler = build_lr_scheduler(cfg, optimizer)
    seen = []
    for _ in range(11):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen[0] == pytest.approx(0.025) and seen[-1] == pytest.approx(0.0025)
