import math

import torch

from codetr_d2.layers import SinePositionEncoding


def test_against_the_formula():
    mask = torch.zeros(1, 4, 5, dtype=torch.bool)
    mask[:, 3:], mask[:, :, 4:] = True, True  # 3 x 4 valid cells
    encoding = SinePositionEncoding(16, temperature=20.0, offset=-0.5)(mask).view(4, 5, 16)
    for row, column in ((0, 0), (2, 3)):
        for k in range(8):
            for part, value, last in ((0, row + 0.5, 3), (1, column + 0.5, 4)):
                angle = value / (last + 1e-6) * 2 * math.pi / 20.0 ** (2 * (k // 2) / 8)
                expected = math.sin(angle) if k % 2 == 0 else math.cos(angle)
                assert abs(encoding[row, column, part * 8 + k].item() - expected) < 1e-5


def test_padding_does_not_move_the_valid_cells():
    encode = SinePositionEncoding(16, temperature=10000.0, offset=-0.5)
    alone = encode(torch.zeros(1, 3, 4, dtype=torch.bool)).view(3, 4, 16)
    mask = torch.ones(1, 6, 7, dtype=torch.bool)
    mask[:, :3, :4] = False
    torch.testing.assert_close(encode(mask).view(6, 7, 16)[:3, :4], alone)
