"""Position encoding of feature maps."""

import torch
from torch import Tensor, nn

from .box_coordinates import sine_embedding

__all__ = ["SinePositionEncoding"]


class SinePositionEncoding(nn.Module):
    """Sine encoding of the cells of a padded feature map, counted over the valid cells only.

    Args:
        embed_dim: channels; the first half encodes y, the second half x.
        temperature: base of the wavelengths.
        offset: added to the count of cells, which starts at 1.
    """

    def __init__(self, embed_dim: int, temperature: float, offset: float):
        super().__init__()
        self.embed_dim = embed_dim
        self.temperature = temperature
        self.offset = offset

    @torch.no_grad()
    def forward(self, padding_mask: Tensor) -> Tensor:
        """[B, height, width] bool, True at padding -> [B, height * width, embed_dim]."""
        valid = ~padding_mask
        y, x = valid.cumsum(1, dtype=torch.float32), valid.cumsum(2, dtype=torch.float32)
        y = (y + self.offset) / (y[:, -1:, :] + 1e-6)
        x = (x + self.offset) / (x[:, :, -1:] + 1e-6)
        return sine_embedding(torch.stack((y, x), dim=-1), self.embed_dim // 2, self.temperature).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, temperature={self.temperature}, offset={self.offset}"
