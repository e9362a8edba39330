import copy

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicStem, ResNet

from codetr_d2.modeling.backbones.folded_batch_norm import fold_frozen_batch_norm


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


@pytest.mark.parametrize("frozen", [False, True])
def test_equals_batch_norm_after_the_convolution(frozen):
    plain = small_resnet().requires_grad_(not frozen)
    folded = copy.deepcopy(plain)
    fold_frozen_batch_norm(folded)
    assert folded.state_dict().keys() == plain.state_dict().keys()
    unfolded_calls = []
    for module in folded.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.register_forward_hook(lambda *args: unfolded_calls.append(1))
    x = torch.randn(2, 3, 50, 67, dtype=torch.float64)
    for _ in range(2):  # the second with other weights: nothing is kept of the first
        with torch.no_grad():
            ours, expected = folded(x), plain(x)
        for name in expected:
            torch.testing.assert_close(ours[name], expected[name])
        assert not unfolded_calls
        gradients = []
        for model in (folded, plain):
            leaves = [x.requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]
            gradients.append(torch.autograd.grad(sum(y.square().sum() for y in model(x).values()), leaves))
        for p, q in zip(*gradients):
            torch.testing.assert_close(p, q)
        assert bool(unfolded_calls) != frozen  # filters in training are left alone
        unfolded_calls.clear()
        with torch.no_grad():
            for p, q in zip(folded.parameters(), plain.parameters()):
                q.add_(0.01 * torch.randn_like(q))
                p.copy_(q)
