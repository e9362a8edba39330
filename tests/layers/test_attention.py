import torch
from torch import nn
from torch.nn import functional as F

from codetr_d2.layers import AttentionBlock, BlockSelfAttention
from codetr_d2.layers.attention import attend_in_blocks


def block(start: int, stop: int, mask=None, context: int = 0) -> AttentionBlock:
    return AttentionBlock(slice(start, stop), slice(start - context, stop), mask)


def test_one_block_equals_multihead_attention():
    ours, torch_own = BlockSelfAttention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    torch_own.load_state_dict(ours.state_dict())
    x, position = torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    expected, _ = torch_own(x + position, x + position, x)
    torch.testing.assert_close(ours(x, position, [block(0, 7)]), expected)


def test_blocks_equal_separate_passes():
    attention = BlockSelfAttention(32, 4)
    x, position = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    together = attention(x, position, [block(0, 5), block(5, 9)])
    first = attention(x[:, :5], position[:, :5], [block(0, 5)])
    second = attention(x[:, 5:], position[:, 5:], [block(0, 4)])
    torch.testing.assert_close(together, torch.cat((first, second), dim=1))


def test_mask_hides_keys():
    attention = BlockSelfAttention(16, 2)
    x, position = torch.randn(1, 5, 16), torch.randn(1, 5, 16)
    mask = torch.tensor([True, True, True, False, False]).expand(1, 1, 5, 5)
    changed = x.clone()
    changed[:, 3:] += 1
    kept = attention(x, position, [block(0, 5, mask)])[:, :3]
    torch.testing.assert_close(kept, attention(changed, position, [block(0, 5, mask)])[:, :3])
    assert not torch.allclose(kept, attention(x, position, [block(0, 5)])[:, :3])


def test_one_way_context():
    """Queries that also see the block before them equal one masked block over both."""
    attention = BlockSelfAttention(16, 2)
    x, position = torch.randn(2, 8, 16), torch.randn(2, 8, 16)
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[:5, 5:] = False
    expected = attention(x, position, [block(0, 8, mask)])
    torch.testing.assert_close(attention(x, position, [block(0, 5), block(5, 8, context=5)]), expected)


def test_values_narrower_than_keys():
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 3)
    mask = torch.rand(2, 1, 1, 9) > 0.3
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    output = attend_in_blocks(q, k, v, [AttentionBlock(slice(None), slice(None), mask)], dropout=0.0)
    torch.testing.assert_close(output, expected)
