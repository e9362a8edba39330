import math

import pytest
import timm
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.modeling import SwinTransformer, build_backbone
from torch import nn

from codetr_d2.checkpoint.bare_backbone import adapt_backbone
from codetr_d2.modeling.backbones import TimmBackbone


def own(backbone):
    return nn.ModuleDict({"backbone": backbone})


def randomise(model):
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point() and value.dim() == 1:
            value.uniform_(-0.5, 0.5)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("depth", [18, 50])
def test_torchvision_resnet_computes_the_same(depth, prefix):
    theirs = randomise(getattr(torchvision.models, f"resnet{depth}")(weights=None))
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth == 18 else 256
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res5"]
    model = own(build_backbone(cfg))
    weights = {prefix + name: value for name, value in theirs.state_dict().items()}
    converted, unused = adapt_backbone(weights, model.state_dict())
    model.load_state_dict(converted, strict=True)
    names = {name.removeprefix(prefix) for name in weights}
    assert unused.keys() == {name for name in names if name.startswith("fc.") or name.endswith("num_batches_tracked")}
    assert "pretraining" in unused["fc.weight"] and "counter" in unused["bn1.num_batches_tracked"]
    image = torch.randn(1, 3, 64, 96)
    features = model["backbone"].eval()(image)
    x = theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image)))))
    res3 = theirs.layer2(x)
    torch.testing.assert_close(features["res3"], res3)
    torch.testing.assert_close(features["res5"], theirs.layer4(theirs.layer3(res3)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_swin_of_its_authors():
    def swin():
        return SwinTransformer(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), window_size=4).eval()

    theirs = randomise(swin())
    weights = {k: v for k, v in theirs.state_dict().items() if not k.startswith("norm")}
    weights |= {name: torch.zeros(3) for name in ("norm.weight", "norm.bias", "head.weight", "head.bias")}
    weights["layers.0.blocks.1.attn_mask"] = torch.zeros(3)
    model = own(swin())
    converted, unused = adapt_backbone(weights, model.state_dict())
    result = model.load_state_dict(converted, strict=False)
    assert not result.unexpected_keys and all(k.startswith("backbone.norm") for k in result.missing_keys)
    assert set(unused) == {"norm.weight", "norm.bias", "head.weight", "head.bias", "layers.0.blocks.1.attn_mask"}
    for i in range(4):
        getattr(model["backbone"], f"norm{i}").load_state_dict(getattr(theirs, f"norm{i}").state_dict())
    image = torch.randn(1, 3, 64, 64)
    expected, actual = theirs(image), model["backbone"](image)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


def eva_names(grid, dim=8):
    return {
        "pos_embed": torch.randn(1, 1 + grid**2, dim),
        "patch_embed.proj.weight": torch.randn(dim, 3, 16, 16),
        "blocks.0.attn.q_proj.weight": torch.randn(dim, dim),
        "blocks.0.attn.q_bias": torch.randn(dim),
    }


def test_eva02_positions_are_resized():
    own_dict = {f"backbone.net.{name}": value for name, value in eva_names(8).items()}
    own_dict["backbone.p2.1.weight"] = torch.zeros(1)
    weights = eva_names(6)
    # A linear ramp stays one, apart from its borders, under bicubic interpolation.
    ramp = torch.linspace(0, 1, 6).repeat(6, 1)
    weights["pos_embed"][0, 1:, 0] = ramp.flatten()
    extra = ("cls_token", "mask_token", "norm.weight", "fc_norm.bias", "head.weight", "rope.freqs_cos")
    extra += ("blocks.0.attn.rope.freqs_sin",)
    weights |= {name: torch.zeros(1) for name in extra}
    converted, unused = adapt_backbone(weights, own_dict)
    assert converted.keys() == own_dict.keys() - {"backbone.p2.1.weight"} and unused.keys() == set(extra)
    assert "pretraining" in unused["cls_token"] and "computed" in unused["rope.freqs_cos"]
    positions = converted["backbone.net.pos_embed"]
    assert positions.shape == (1, 65, 8)
    assert torch.equal(positions[:, 0], weights["pos_embed"][:, 0])
    grid = positions[0, 1:, 0].view(8, 8)
    expected = ((torch.arange(8) + 0.5) * 6 / 8 - 0.5) / 5
    torch.testing.assert_close(grid[:, 2:6], expected[2:6].expand(8, 4), rtol=0, atol=0.01)
    # The same grid stays as it is.
    same = adapt_backbone(eva := eva_names(8), own_dict)[0]["backbone.net.pos_embed"]
    assert same is eva["pos_embed"]


def test_positions_without_a_class_token_are_left_to_the_check_of_shapes():
    own_dict = {f"backbone.net.{name}": value for name, value in eva_names(8).items()}
    weights = eva_names(6)
    weights["pos_embed"] = torch.zeros(1, 36, 8)
    assert not math.sqrt(35).is_integer()
    assert adapt_backbone(weights, own_dict)[0]["backbone.net.pos_embed"].shape == (1, 36, 8)


@torch.no_grad()
def test_timm():
    model = own(TimmBackbone("tf_efficientnet_lite0", ["stride8", "stride32"]))
    theirs = timm.create_model("tf_efficientnet_lite0")
    converted, unused = adapt_backbone(theirs.state_dict(), model.state_dict())
    result = model.load_state_dict(converted, strict=False)
    assert not [name for name in result.missing_keys if not name.endswith("num_batches_tracked")]
    assert {"classifier.weight", "conv_head.weight"} <= unused.keys()
    assert "pretraining" in unused["conv_head.weight"]


def test_other_models_are_left_alone():
    weights = {"encoder.weight": torch.zeros(1)}
    assert adapt_backbone(weights, {"backbone.conv.weight": torch.zeros(1)}) == (weights, {})
