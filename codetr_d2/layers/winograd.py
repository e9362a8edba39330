"""3x3 convolutions by Winograd's algorithm, for training on the CPU."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["conv3x3"]

# Of F(4x4, 3x3), for the interpolation points 0, 1, -1, 2, -2 and infinity: a tile of 6x6 inputs gives 4x4 outputs by
# 36 products for each pair of channels, in place of 144. Source: Lavin and Gray, "Fast Algorithms for Convolutional
# Neural Networks", CVPR 2016, section 4.3.
TILE = 4
INPUT = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
WEIGHT = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]  # in 24ths
OUTPUT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
# Where it is faster than the direct convolution.
MIN_CHANNELS, MIN_CELLS = 128, 4000


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 3x3 convolution of stride 1 that pads its input with zeros by one cell.

    On the CPU, in float32 and where gradients are asked for, wide convolutions of large maps take Winograd's algorithm,
    whose rounding errors are some times larger than those of the direct one; everything else is PyTorch's.

    Args:
        x: [B, C, height, width].
        weight: [C', C, 3, 3].
        bias: [C'].

    Returns:
        [B, C', height, width].
    """
    suits = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and min(weight.shape[:2]) >= MIN_CHANNELS
        and x.shape[2] * x.shape[3] >= MIN_CELLS
        and len(x) > 0
    )
    if not suits:
        return F.conv2d(x, weight, bias, padding=1)
    return _Winograd.apply(x, weight, bias)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        output = _convolve(x, weight)
        return output if bias is None else output.add_(bias[:, None, None])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _convolve(gradient, weight.flip(2, 3).transpose(0, 1)) if of_x else None,
            _weight_gradient(x, gradient) if of_weight else None,
            gradient.sum(dim=(0, 2, 3)) if of_bias else None,
        )


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    batch_size, _, height, width = x.shape
    out_channels, in_channels = weight.shape[:2]
    rows, columns = -(-height // TILE), -(-width // TILE)
    weights = _squared(WEIGHT, 24) @ weight.permute(2, 3, 1, 0).reshape(9, -1)  # [36, C * C']
    products = torch.bmm(_transformed_tiles(x), weights.view(36, in_channels, out_channels))  # [36, tiles, C']
    outputs = (_squared(OUTPUT) @ products.view(36, -1)).view(TILE, TILE, batch_size, rows, columns, out_channels)
    outputs = outputs.permute(2, 3, 0, 4, 1, 5).reshape(batch_size, rows * TILE, columns * TILE, out_channels)
    return outputs[:, :height, :width].contiguous().permute(0, 3, 1, 2)


def _weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    batch_size, out_channels, height, width = gradient.shape
    rows, columns = -(-height // TILE), -(-width // TILE)
    padded = F.pad(gradient.permute(0, 2, 3, 1), (0, 0, 0, columns * TILE - width, 0, rows * TILE - height))
    tiles = padded.view(batch_size, rows, TILE, columns, TILE, out_channels).permute(2, 4, 0, 1, 3, 5)
    products = (_squared(OUTPUT).T @ tiles.reshape(TILE * TILE, -1)).view(36, -1, out_channels)
    weights = torch.bmm(_transformed_tiles(x).transpose(1, 2), products)  # [36, C, C']
    return (_squared(WEIGHT, 24).T @ weights.view(36, -1)).view(3, 3, -1, out_channels).permute(3, 2, 0, 1)


def _transformed_tiles(x: Tensor) -> Tensor:
    """[B, C, height, width] -> [36, tiles, C]"""
    batch_size, channels, height, width = x.shape
    rows, columns = -(-height // TILE), -(-width // TILE)
    ends = (0, 0, 1, columns * TILE + 1 - width, 1, rows * TILE + 1 - height)
    padded = F.pad(x.permute(0, 2, 3, 1), ends)  # [B, rows * 4 + 2, columns * 4 + 2, C]
    tiles = padded.unfold(1, 6, TILE).unfold(2, 6, TILE)  # [B, rows, columns, C, 6, 6]
    tiles = tiles.permute(4, 5, 0, 1, 2, 3).reshape(36, -1)
    return (_squared(INPUT) @ tiles).view(36, -1, channels)


def _squared(matrix: list[list[int]], divisor: int = 1) -> Tensor:
    """The Kronecker square of a matrix: what it does to a flattened tile from both sides."""
    matrix = torch.tensor(matrix, dtype=torch.float32) / divisor
    return torch.kron(matrix, matrix)
