import copy

import torch
from detectron2.modeling.backbone.resnet import BasicStem, ResNet

from codetr_d2.modeling.backbones.resnet import CheckpointedResNet


def test_recomputes_blocks():
    plain = ResNet(
        BasicStem(3, 64, norm="FrozenBN"),
        ResNet.make_default_stages(50, norm="FrozenBN")[:2],
        out_features=["res3"],
        freeze_at=1,
    )
    ours = CheckpointedResNet(copy.deepcopy(plain))
    assert list(ours.state_dict()) == list(plain.state_dict()) and ours.output_shape() == plain.output_shape()
    calls = []
    for model in (ours, plain):
        model.res3[0].conv2.register_forward_hook(lambda module, *_: calls.append(module))
    x = torch.randn(1, 3, 64, 64)
    y, expected = ours(x)["res3"], plain(x)["res3"]
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for p, q in zip(ours.parameters(), plain.parameters()):
        assert p.grad is None and q.grad is None if not q.requires_grad else torch.equal(p.grad, q.grad)
    first, second = ours.res3[0].conv2, plain.res3[0].conv2
    assert (calls.count(first), calls.count(second)) == (2, 1)
