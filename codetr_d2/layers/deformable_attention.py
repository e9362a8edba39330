"""Multi-scale deformable attention as a module."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import ms_deform_attn

__all__ = ["MultiScaleDeformableAttention"]


class MultiScaleDeformableAttention(nn.Module):
    """Attention that samples a few learned points of each feature level around a reference point or box.

    Each query predicts, for every head, level and point, an offset and an attention weight; the weights of a head
    add up to one over all its levels and points. Source: Deformable DETR (Zhu et al., ICLR 2021), equation 3.

    Args:
        embed_dim: channels C of queries and values.
        num_heads: attention heads H; they share the channels equally.
        num_levels: feature levels L.
        num_points: sampling points P of each head and level.
        backend: what computes it, see :func:`codetr_d2.ops.check_backend`.

    Raises:
        ValueError: ``embed_dim`` is no multiple of ``num_heads``.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        backend: str = "auto",
    ):
        super().__init__()
        if embed_dim % num_heads != 0:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.backend = backend
        self.sampling_offsets = nn.Linear(
            embed_dim, num_heads * num_levels * num_points * 2
        )  # (head, level, point, xy)
        self.attention_weights = nn.Linear(embed_dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The heads look in directions spread over the circle, point i goes i + 1 cells far (on the larger axis)."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        # [H, 1, 1, 2] * [P, 1] -> [H, L, P, 2]
        offsets = (directions[:, None, None] * distances[:, None]).expand(-1, self.num_levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        value: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from the queries to the values. Residual, dropout and position embedding are the caller's.

        Args:
            query: [B, Q, C] queries, with their position embedding added.
            value: [B, S, C] tokens of all levels, without position embedding.
            reference_points: [B, Q, L, 2] points (x, y) or [B, Q, L, 4] boxes (cx, cy, w, h), in fractions of each
                level's map, padding included. Offsets count cells of the level, or for a box fractions of its size.
            spatial_shapes: (height, width) of each level, as numbers.
            padding_mask: [B, S] bool, True at tokens that lie in the padding: their value is zero.

        Returns:
            [B, Q, C].

        Raises:
            ValueError: sizes that don't fit each other.
        """
        self._check(query, value, reference_points, spatial_shapes, padding_mask)
        value = self.value_proj(value)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0)
        value = value.unflatten(2, (self.num_heads, -1))  # [B, S, C] -> [B, S, H, C/H]

        locations, weights = self.points_and_weights(query, reference_points, spatial_shapes)
        output = ms_deform_attn(value, spatial_shapes, locations, weights, self.backend)
        return self.output_proj(output)

    def points_and_weights(
        self, query: Tensor, reference_points: Tensor, spatial_shapes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Where the queries sample, and what each sample counts. Args: see :meth:`forward`.

        Returns:
            [B, Q, H, L, P, 2] locations (x, y), in fractions of each level's map, padding included, and
            [B, Q, H, L, P] weights, which add up to 1 over levels and points. Float32, or float64 as the query.
        """
        points = (*query.shape[:2], self.num_heads, self.num_levels, self.num_points)
        # Locations and softmax at full precision, whatever autocast makes of the linear layers.
        dtype = torch.promote_types(query.dtype, torch.float32)
        weights = self.attention_weights(query).to(dtype).unflatten(2, (self.num_heads, -1)).softmax(-1).view(points)
        offsets = self.sampling_offsets(query).to(dtype)
        locations = self.sampling_locations(reference_points.to(dtype), offsets, spatial_shapes).view(*points, 2)
        return locations, weights

    def sampling_locations(
        self, reference_points: Tensor, offsets: Tensor, spatial_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """[B, Q, L, 2 or 4] reference points or boxes and [B, Q, H * L * P * 2] offsets -> [B, Q, H, L * P * 2].

        The points of a query are written out as a row, as long as that of one head's offsets: adding pairs (x, y),
        one after the other, would take ten times as long.
        """
        offsets = offsets.unflatten(2, (self.num_heads, -1))
        reference_points = reference_points.unsqueeze(3).expand(-1, -1, -1, self.num_points, -1)
        if reference_points.shape[-1] == 4:
            scale = (reference_points[..., 2:] * (0.5 / self.num_points)).flatten(2).unsqueeze(2)
        else:
            # Filled, not copied from a list: that waits for the device, and an exported program would keep the list.
            sizes = [offsets.new_full((1,), size) for height, width in spatial_shapes for size in (width, height)]
            scale = torch.cat(sizes).reciprocal().view(-1, 1, 2).expand(-1, self.num_points, -1).flatten()
        return torch.addcmul(reference_points[..., :2].flatten(2).unsqueeze(2), offsets, scale)

    def _check(self, query, value, reference_points, spatial_shapes, padding_mask) -> None:
        levels = self.num_levels
        if query.dim() != 3 or query.shape[2] != self.embed_dim:
            raise ValueError(f"query must be [B, Q, {self.embed_dim}], got {tuple(query.shape)}")
        if value.dim() != 3 or value.shape[0] != query.shape[0] or value.shape[2] != self.embed_dim:
            raise ValueError(f"value must be [{query.shape[0]}, S, {self.embed_dim}], got {tuple(value.shape)}")
        allowed = [(*query.shape[:2], levels, size) for size in (2, 4)]
        if tuple(reference_points.shape) not in allowed:
            raise ValueError(
                f"reference_points must be {allowed[0]} or {allowed[1]}, got {tuple(reference_points.shape)}"
            )
        if len(spatial_shapes) != levels:
            raise ValueError(f"spatial_shapes must be {levels} pairs (height, width), got {spatial_shapes}")
        if padding_mask is not None and (padding_mask.shape != value.shape[:2] or padding_mask.dtype != torch.bool):
            got = f"{padding_mask.dtype} {tuple(padding_mask.shape)}"
            raise ValueError(f"padding_mask must be bool {tuple(value.shape[:2])}, got {got}")
