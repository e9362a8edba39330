"""Convolutions at some cells of a pyramid alone."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["conv_at_cells"]


def conv_at_cells(maps: list[Tensor], cells: Tensor, convs: list[nn.Conv2d]) -> Tensor:
    """What convolutions one after the other, with a ReLU between them, give at some cells of feature maps.

    It is computed from the surroundings of these cells, or on the whole maps where that is less work.

    Args:
        maps: for each of L levels [B, C, height, width].
        cells: [B, S] bool, over the cells of all levels, row by row.
        convs: 3x3 convolutions of stride 1 that pad with zeros, without normalisation.

    Returns:
        [Q, C'], for each True of ``cells`` in their order.
    """
    radius = len(convs)
    if (2 * radius - 1) ** 2 * cells.sum() > cells.numel():
        outputs = []
        for x in maps:
            for conv in convs[:-1]:
                x = F.relu(_conv(conv, x, padding=1))
            outputs.append(_conv(convs[-1], x, padding=1).flatten(2).transpose(1, 2))
        return torch.cat(outputs, dim=1)[cells]

    # Of each cell: height and width of its map, its row and column there, and where it lies among the padded cells.
    tables, start = [], 0
    for x in maps:
        height, width = x.shape[-2:]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        padded_width = width + 2 * radius
        corner = start + y * padded_width + x
        sizes = torch.tensor([height, width, padded_width]).expand(height * width, 3)
        tables.append(torch.cat((sizes, torch.stack((y, x, corner), dim=-1).flatten(0, 1)), dim=1))
        start += (height + 2 * radius) * padded_width
    image, cell = cells.nonzero(as_tuple=True)
    height, width, padded_width, y, x, corner = torch.cat(tables).to(cells.device)[cell].unbind(dim=1)

    padded = torch.cat([F.pad(x, (radius,) * 4).flatten(2).transpose(1, 2) for x in maps], dim=1)
    around = torch.arange(2 * radius + 1, device=cells.device)
    index = corner[:, None, None] + around[:, None] * padded_width[:, None, None] + around
    patches = padded[image[:, None, None], index].permute(0, 3, 1, 2)  # [Q, C, side, side]
    for conv in convs[:-1]:
        patches = F.relu(_conv(conv, patches, padding=0))
        # The next convolution pads this one's output with zeros: it must be zero outside the map.
        radius -= 1
        offsets = torch.arange(-radius, radius + 1, device=cells.device)
        rows, columns = y[:, None] + offsets, x[:, None] + offsets
        rows, columns = (rows >= 0) & (rows < height[:, None]), (columns >= 0) & (columns < width[:, None])
        patches = patches * (rows[:, None, :, None] & columns[:, None, None, :])
    return _conv(convs[-1], patches, padding=0).flatten(1)


def _conv(conv: nn.Conv2d, x: Tensor, padding: int) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, padding=padding)
