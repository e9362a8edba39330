import torch
from torch import nn

from codetr_d2.layers import BlockSelfAttention


def test_one_block_equals_multihead_attention():
    ours, torch_own = BlockSelfAttention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    torch_own.load_state_dict(ours.state_dict())
    x, position = torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    expected, _ = torch_own(x + position, x + position, x)
    torch.testing.assert_close(ours(x, position, [7], [None]), expected)


def test_blocks_equal_separate_passes():
    attention = BlockSelfAttention(32, 4)
    x, position = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    together = attention(x, position, [5, 4], [None, None])
    first = attention(x[:, :5], position[:, :5], [5], [None])
    second = attention(x[:, 5:], position[:, 5:], [4], [None])
    torch.testing.assert_close(together, torch.cat((first, second), dim=1))


def test_mask_hides_keys():
    attention = BlockSelfAttention(16, 2)
    x, position = torch.randn(1, 5, 16), torch.randn(1, 5, 16)
    mask = torch.tensor([True, True, True, False, False]).expand(1, 1, 5, 5)
    changed = x.clone()
    changed[:, 3:] += 1
    kept = attention(x, position, [5], [mask])[:, :3]
    torch.testing.assert_close(kept, attention(changed, position, [5], [mask])[:, :3])
    assert not torch.allclose(kept, attention(x, position, [5], [None])[:, :3])
