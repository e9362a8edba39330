import pytest
import torch
from torch import nn
from torch.nn import functional as F

from codetr_d2.modeling.auxiliary.conv_at_cells import conv_at_cells

SHAPES = [(12, 17), (6, 9), (3, 5), (1, 1)]


def on_the_whole_maps(maps, cells, convs):
    outputs = []
    for x in maps:
        for conv in convs[:-1]:
            x = F.relu(conv(x))
        outputs.append(convs[-1](x).flatten(2).transpose(1, 2))
    return torch.cat(outputs, dim=1)[cells]


@pytest.mark.parametrize("num_convs", [1, 2, 3])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 1.0])
def test_equals_the_whole_maps(num_convs, share):
    """At the borders and corners of the maps too; with few cells and with all of them, and none at all."""
    torch.manual_seed(0)
    maps = [torch.randn(2, 8, *shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]
    convs = [nn.Conv2d(8, 8, 3, padding=1).double() for _ in range(num_convs - 1)]
    convs.append(nn.Conv2d(8, 5, 3, padding=1).double())
    cells = torch.rand(2, sum(h * w for h, w in SHAPES)) < share
    if 0 < share < 0.1:
        cells[0, [0, 16, 187, 203]] = True  # the corners of the finest map
        cells[1, [-1, -2]] = True  # the coarsest map and a corner of the one before
    inputs = [*maps, *(p for conv in convs for p in conv.parameters())]
    outputs = [function(maps, cells, convs) for function in (conv_at_cells, on_the_whole_maps)]
    assert outputs[0].shape == (cells.sum(), 5)
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad((x * x).sum(), inputs) for x in outputs]
    for ours, expected in zip(*gradients):
        torch.testing.assert_close(ours, expected)
