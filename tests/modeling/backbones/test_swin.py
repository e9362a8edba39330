import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from timm.layers import DropPath
from timm.models.swin_transformer import SwinTransformer

from codetr_d2 import add_codetr_config
from codetr_d2.errors import InputError
from codetr_d2.modeling.backbones import SwinBackbone

TINY = {"embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}
ALL = ["p0", "p1", "p2", "p3"]


def randomize(module):
    """Weights far from the initial ones, so that every bias and table counts."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def timm_stages(model, images):
    """The output of each stage of a timm Swin, before the next stage's patch merging, [B, h, w, C]."""
    x = model.patch_embed(images)
    for stage in model.layers:
        x = stage(x)
        yield x


@pytest.mark.parametrize(
    ("window_size", "depth", "size"),
    [
        (3, 2, (192, 192)),  # 48, 24, 12, 6 cells: whole windows
        # 38 x 52, 19 x 26, 10 x 13, 5 x 7: images, merges and windows are padded. No second, shifted block: timm pads
        # after the shift, detectron2 before it, as published.
        (4, 1, (150, 205)),
    ],
)
def test_features_equal_timm(window_size, depth, size):
    torch.manual_seed(0)
    padding = (0, -size[1] % 4, 0, -size[0] % 4)  # timm takes only whole patches
    padded = (size[0] + padding[3], size[1] + padding[1])
    options = {**TINY, "window_size": window_size, "depths": [depth] * 4}
    theirs = SwinTransformer(img_size=padded, **options).eval()
    ours = SwinBackbone(ALL, **options).eval()
    randomize(theirs)
    weights = {}
    for name, value in theirs.state_dict().items():
        if ".downsample." in name:  # timm merges patches at the start of a stage, detectron2 at its end
            stage = int(name.split(".")[1])
            name = name.replace(f"layers.{stage}", f"layers.{stage - 1}")
        weights[name] = value
    missing, _ = ours.load_state_dict(weights, strict=False)
    assert all(name.startswith("norm") or name.endswith("relative_position_index") for name in missing)

    images = torch.randn(2, 3, *size)
    features = ours(images)
    assert list(features) == ALL
    for i, expected in enumerate(timm_stages(theirs, F.pad(images, padding))):
        expected = F.layer_norm(expected, expected.shape[-1:]).permute(0, 3, 1, 2)
        torch.testing.assert_close(features[f"p{i}"], expected, rtol=1e-4, atol=1e-4)
        shape = ours.output_shape()[f"p{i}"]
        assert features[f"p{i}"].shape[1] == shape.channels
        assert shape.stride == 2 ** (i + 2)


def test_only_the_features_asked_for_have_a_norm():
    backbone = SwinBackbone(["p1", "p3"], **TINY)
    norms = {name.split(".")[0] for name, _ in backbone.named_parameters() if name.startswith("norm")}
    assert norms == {"norm1", "norm3"}
    assert not any(name.startswith("layers.3") for name, _ in SwinBackbone(["p1", "p2"], **TINY).named_parameters())
    assert list(backbone(torch.randn(1, 3, 40, 50))) == list(backbone.output_shape()) == ["p1", "p3"]


def test_checkpointing_changes_neither_features_nor_gradients():
    torch.manual_seed(0)
    plain = randomize(SwinBackbone(ALL, drop_path_rate=0.5, **TINY)).train()
    saving = SwinBackbone(ALL, drop_path_rate=0.5, activation_checkpointing=True, **TINY).train()
    saving.load_state_dict(plain.state_dict())
    saving = copy.deepcopy(saving)  # as the moving average of the weights does
    images = torch.randn(2, 3, 64, 64)
    results = []
    for backbone in (plain, saving):
        torch.manual_seed(1)
        features = backbone(images)
        sum(x.square().sum() for x in features.values()).backward()
        results.append([*features.values(), *(p.grad for p in backbone.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_checkpointing_keeps_fewer_activations():
    def saved_elements(activation_checkpointing):
        backbone = SwinBackbone(ALL, activation_checkpointing=activation_checkpointing, **TINY)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            backbone(torch.randn(1, 3, 64, 64))
        return sum(kept)

    assert saved_elements(True) < saved_elements(False) / 3


def test_stochastic_depth_rises_linearly_and_rests_in_evaluation():
    backbone = SwinBackbone(ALL, drop_path_rate=0.7, **TINY)
    rates = [module.drop_prob for module in backbone.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.1 * i for i in range(1, 8)])  # the first of the eight blocks has none
    images = torch.randn(1, 3, 64, 64)
    backbone.eval()
    torch.testing.assert_close(backbone(images), backbone(images), rtol=0, atol=0)
    backbone.train()
    assert any(not torch.equal(backbone(images)["p3"], backbone(images)["p3"]) for _ in range(5))


@pytest.mark.parametrize("freeze_at", range(6))
def test_the_first_parts_are_frozen(freeze_at):
    backbone = SwinBackbone(ALL, drop_path_rate=0.7, freeze_at=freeze_at, **TINY).train()
    first = ("patch_embed.", "layers.0.", "layers.1.", "layers.2.", "layers.3.")[:freeze_at]
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != name.startswith(first), name
    drops = [name for name, module in backbone.named_modules() if isinstance(module, DropPath)]
    assert not any(name.startswith(first) for name in drops)  # what is frozen gives the same features at each step
    assert len(drops) == (0 if freeze_at == 5 else 8 - 2 * (freeze_at - 1) if freeze_at > 1 else 7)


def test_grey_images():
    torch.manual_seed(0)
    colours, grey = (randomize(SwinBackbone(ALL, in_channels=channels, **TINY)).eval() for channels in (3, 1))
    weights = colours.state_dict()
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].sum(1, keepdim=True)
    grey.load_state_dict(weights)
    x = torch.randn(1, 1, 64, 64)
    torch.testing.assert_close(grey(x)["p3"], colours(x.expand(-1, 3, -1, -1))["p3"], rtol=1e-4, atol=1e-4)


def test_the_config_gives_the_backbone():
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_swin_backbone"
    cfg.MODEL.CODETR.IN_FEATURES = ["p1", "p2", "p3"]
    backbone = build_backbone(cfg)
    assert {name: shape.channels for name, shape in backbone.output_shape().items()} == {
        "p1": 192,
        "p2": 384,
        "p3": 768,
    }
    assert backbone.size_divisibility == 0
    trained = {name.rpartition(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}
    assert "layers.1.blocks.0.norm1" in trained and "patch_embed.proj" not in trained  # detectron2's default is 2
    assert sum(p.numel() for p in backbone.parameters()) == 27520506  # as the published model has
    cfg.MODEL.CODETR.IN_FEATURES = ["res3"]
    with pytest.raises(InputError, match=r"MODEL\.CODETR\.IN_FEATURES is 'res3'; it may be: p0, p1, p2, p3"):
        build_backbone(cfg)
