"""Files that hold a backbone alone, as its pretraining left it."""

import re
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor

from .published import COUNTER, FOREIGN, ROTARY, published_to_codetr

__all__ = ["adapt_backbone"]

_POSITIONS = "backbone.net.pos_embed"
# Why tensors of such a file have no place in the model.
_REASONS = [
    (r"(fc|head|norm|fc_norm|classifier|conv_head|bn2|cls_token|mask_token)(\.|$)", "part of its pretraining's task"),
    (r".*attn_mask$", "computed from the size of the image"),
    (r".*num_batches_tracked$", COUNTER),
    (r".*freqs_(cos|sin)$", ROTARY),
]


def adapt_backbone(weights: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Find the model's names for the tensors of a backbone.

    The file may have the names of torchvision's ResNet, of the Swin Transformer's or EVA-02's authors, of the published
    detectors' backbones, or those of the model with their first parts left out (timm, detectron2). Absolute positions
    of another grid are resized.

    Args:
        weights: by the names of the file.
        own: the model's state dict.

    Returns:
        The tensors by the model's names, and the names of the file that have none, with the reason why. All tensors as
        they are where none fits.
    """
    prefix = _missing_prefix(weights, own)
    candidates = [({prefix + name: value for name, value in weights.items()}, {})]
    candidates += [published_to_codetr({p + name: value for name, value in weights.items()}) for p in ("backbone.", "")]
    counts = [sum(name in own for name in converted) for converted, _ in candidates]
    if not max(counts):
        return weights, {}
    converted, unused = candidates[counts.index(max(counts))]
    result = {name: value for name, value in converted.items() if name in own}
    if _POSITIONS in result:
        result[_POSITIONS] = _resize_positions(result[_POSITIONS], own[_POSITIONS].shape)
    without_place = {**unused, **{name: FOREIGN for name in converted if name not in own}}
    reasons = {}
    for name, reason in without_place.items():
        bare = name.removeprefix(prefix).removeprefix("backbone.")
        reasons[bare] = next((r for p, r in _REASONS if re.match(p, bare)), reason) if reason == FOREIGN else reason
    return result, reasons


def _missing_prefix(weights: dict, own: dict) -> str:
    """The first part of the model's names that those of the file lack, "" where no names fit."""
    prefixes = Counter()
    for name in own:
        if name.startswith("backbone."):
            parts = name.split(".")
            for i in range(1, len(parts)):
                if ".".join(parts[i:]) in weights:
                    prefixes[".".join(parts[:i]) + "."] += 1
    return prefixes.most_common(1)[0][0] if prefixes else ""


def _resize_positions(positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[1, 1 + g * g, C] position embeddings, that of the class token first -> those of another square grid."""
    old, new = (round((n - 1) ** 0.5) for n in (positions.shape[1], shape[1]))
    if positions.shape[-1] != shape[-1] or old == new or (1 + old**2, 1 + new**2) != (positions.shape[1], shape[1]):
        return positions
    grid = positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.flatten(2).transpose(1, 2).to(positions.dtype)
    return torch.cat((positions[:, :1], grid), dim=1)
