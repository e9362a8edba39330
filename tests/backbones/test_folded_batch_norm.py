import copy

import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicStem, ResNet

from codetr_d2.backbones.folded_batch_norm import fold_frozen_batch_norm


def small_resnet():
    """A ResNet in double precision whose frozen batch norms do something."""
    stages = ResNet.make_default_stages(50, norm="FrozenBN")[:2]
    model = ResNet(BasicStem(3, 64, norm="FrozenBN"), stages, out_features=["res2", "res3"])
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for buffer in (module.weight, module.running_var):
                buffer.uniform_(0.5, 1.5)
            for buffer in (module.bias, module.running_mean):
                buffer.normal_()
    return model.double()


def test_equals_batch_norm_after_the_convolution():
    plain = small_resnet()
    folded = copy.deepcopy(plain)
    fold_frozen_batch_norm(folded)
    assert folded.state_dict().keys() == plain.state_dict().keys()
    calls = []
    for module in folded.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.register_forward_hook(lambda *args: calls.append(1))
    x = torch.randn(2, 3, 50, 67, dtype=torch.float64)
    for _ in range(2):  # the second with other weights: nothing is kept of the first
        ours, expected = folded(x), plain(x)
        for name in expected:
            torch.testing.assert_close(ours[name], expected[name])
        for model, features in ((folded, ours), (plain, expected)):
            model.zero_grad()
            sum(y.square().sum() for y in features.values()).backward()
        for p, q in zip(folded.parameters(), plain.parameters()):
            torch.testing.assert_close(p.grad, q.grad)
            with torch.no_grad():
                p.add_(0.01 * p.grad / p.grad.norm())
                q.copy_(p)
    assert not calls
