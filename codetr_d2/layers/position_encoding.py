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
    def forward(self, padding_mask: Tensor, is_padded: bool = True) -> Tensor:
        """
        Args:
            padding_mask: [B, height, width] bool, True at padding.
            is_padded: False where the mask is known to be False everywhere: a row then has one encoding of y, and a
                column one of x, which need not be computed for each cell.

        Returns:
            [B, height * width, embed_dim].
        """
        valid = ~padding_mask
        y, x = valid.cumsum(1, dtype=torch.float32), valid.cumsum(2, dtype=torch.float32)
        if not is_padded:
            y, x = y[:, :, :1], x[:, :1]
        parts = []
        for count, last in ((y, y[:, -1:]), (x, x[:, :, -1:])):
            position = (count + self.offset) / (last + 1e-6)
            part = sine_embedding(position.unsqueeze(-1), self.embed_dim // 2, self.temperature)
            parts.append(part.expand(*padding_mask.shape, -1))
        return torch.cat(parts, dim=-1).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, temperature={self.temperature}, offset={self.offset}"
