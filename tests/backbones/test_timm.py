import pytest
import timm
import torch

from codetr_d2.backbones import TimmBackbone
from codetr_d2.errors import InputError


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
