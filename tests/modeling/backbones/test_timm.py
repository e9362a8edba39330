import pytest
import timm
import torch

from codetr_d2.errors import InputError
from codetr_d2.modeling.backbones import TimmBackbone


def test_features_equal_timm():
    torch.manual_seed(0)
    ours = TimmBackbone("tf_efficientnet_lite0", ["stride8", "stride32"], freeze_batch_norm=True).eval()
    plain = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(2, 4)).eval()
    plain.load_state_dict(ours.model.state_dict())  # freezing keeps names; and the activations fused into batch norm
    x = torch.randn(1, 3, 70, 101)
    features = ours(x)
    for ours_i, expected in zip(features.values(), plain(x)):
        torch.testing.assert_close(ours_i, expected)
    for name, shape in ours.output_shape().items():
        assert features[name].shape[1] == shape.channels
        assert features[name].shape[2:] == (-(-70 // shape.stride), -(-101 // shape.stride))


def test_frozen_batch_norm_does_not_move():
    backbone = TimmBackbone("tf_efficientnet_lite0", ["stride8"]).train()
    before = {name: x.clone() for name, x in backbone.named_buffers()}
    backbone(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(x, before[name]) for name, x in backbone.named_buffers())
    assert not any("bn" in name for name, _ in backbone.named_parameters())


@pytest.mark.parametrize(
    ("name", "feature", "message"),
    [
        ("tf_efficientnet_lite99", "stride8", "MODEL.TIMM.NAME: timm has no model 'tf_efficientnet_lite99'.*lite0"),
        ("tf_efficientnet_lite0", "res3", "MODEL.CODETR.IN_FEATURES.*has no .*res3.*stride8"),
    ],
)
def test_bad_names(name, feature, message):
    with pytest.raises(InputError, match=message):
        TimmBackbone(name, [feature])


def test_weights_that_cannot_be_fetched(monkeypatch):
    create = timm.create_model

    def without_network(*args, pretrained=False, **options):
        return open("no/such/file") if pretrained else create(*args, **options)

    monkeypatch.setattr(timm, "create_model", without_network)
    with pytest.raises(InputError, match=r"MODEL\.TIMM\.PRETRAINED: .* resnet18 .*no/such/file.*MODEL\.WEIGHTS"):
        TimmBackbone("resnet18", ["stride8"], pretrained=True)


@pytest.mark.parametrize("name", ["convnext_atto", "pvt_v2_b0", "resnet18"])
def test_convolutional_and_hierarchical_models(name):
    backbone = TimmBackbone(name, ["stride8", "stride16", "stride32"]).eval()
    assert backbone.size_divisibility == (32 if name == "convnext_atto" else 0)  # ConvNeXt rounds down
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 64, 96))
    for feature, shape in backbone.output_shape().items():
        assert features[feature].shape == (1, shape.channels, 64 // shape.stride, 96 // shape.stride)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("resnet18", [["conv1", "bn1"], ["layer1"], ["layer2"]]),
        ("tf_efficientnet_lite0", [["conv_stem", "bn1"], ["blocks.0"], ["blocks.1"]]),
        ("vit_tiny_patch16_224", [["model.cls_token", "model.pos_embed", "model.patch_embed"], ["model.blocks.0"]]),
    ],
)
def test_the_first_parts_are_frozen(name, parts):
    for freeze_at in range(len(parts) + 1):
        feature = "stride16" if name.startswith("vit") else "stride32"
        model = TimmBackbone(name, [feature], freeze_batch_norm=False, freeze_at=freeze_at).train().model
        first = tuple(part + "." for group in parts[:freeze_at] for part in group)
        for parameter_name, parameter in model.named_parameters():
            assert parameter.requires_grad != f"{parameter_name}.".startswith(first), parameter_name
        before = {key: x.clone() for key, x in model.named_buffers()}
        model(torch.randn(2, 3, 64, 64))
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                assert torch.equal(buffer, before[key]) == key.startswith(first), key


@torch.no_grad()
def test_layers_behind_the_last_feature_are_not_trained():
    model = TimmBackbone("tf_efficientnet_lite0", ["stride8", "stride16"]).model
    trained = {name.split(".")[1] for name, p in model.named_parameters() if "blocks" in name and p.requires_grad}
    assert trained == {"0", "1", "2", "3", "4"} and hasattr(model.blocks, "6")


def test_a_model_whose_stages_timm_does_not_know_is_not_frozen(monkeypatch):
    monkeypatch.delattr(timm.models.resnet.ResNet, "group_matcher")
    TimmBackbone("resnet18", ["stride8"])
    with pytest.raises(InputError, match=r"FREEZE_AT is 2, but timm does not say.*stages of resnet18.*set it to 0"):
        TimmBackbone("resnet18", ["stride8"], freeze_at=2)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(channels):
    backbone = TimmBackbone("tf_efficientnet_lite0", ["stride8"], in_channels=channels).eval()
    plain = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(2,), in_chans=channels).eval()
    plain.load_state_dict(backbone.model.state_dict())
    x = torch.randn(1, channels, 64, 64)
    torch.testing.assert_close(backbone(x)["stride8"], plain(x)[0])


def test_channels_come_first_and_images_have_another_size():
    torch.manual_seed(0)
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", ["stride4"]).eval()
    plain = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, out_indices=(0,), img_size=(84, 112))
    plain.load_state_dict(backbone.model.state_dict())
    x = torch.randn(1, 3, 84, 112)
    feature = backbone(x)["stride4"]
    assert feature.shape == (1, 96, 21, 28)
    torch.testing.assert_close(feature, plain.eval()(x)[0].permute(0, 3, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hrnet_w18_small", "swinv2_cr_tiny_ns_224", "swin_tiny_patch4_window7_224"])
def test_a_model_that_needs_whole_cells_asks_for_them(name):
    assert TimmBackbone(name, ["stride8"]).size_divisibility == 32


@pytest.mark.parametrize("name", ["hiera_tiny_224", "mixer_s16_224"])
def test_models_of_one_image_size_are_refused(name):
    with pytest.raises(
        InputError, match=rf"MODEL\.TIMM\.NAME: '{name}' gives feature maps only for images of its own size"
    ):
        TimmBackbone(name, ["stride16"])
