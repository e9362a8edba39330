"""How well the decoder's cross-attention tells objects from background (paper, eqs. 7 and 8), and where queries look.

The attention score of a cell is what it gets from all matching queries in all layers of the decoder, with the mean over
the heads. Deformable attention gives the weight of a sampling point to the four cells around it, in the shares with
which it reads them; what lies outside of the map is left out. The levels are combined as in eq. 7. The paper leaves
open how sparse weights become a map.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from ..layers import ConditionalCrossAttention, MultiScaleDeformableAttention
from ..modeling.pyramid import FeaturePyramid, Geometry
from ..modeling.structures import DecoderOutput
from ..ops import ms_deform_attn
from . import plots
from .compare_maps import compare_maps
from .maps import combine_levels, levels_of_image
from .models import AnalysedModel

__all__ = ["LayerAttention", "cross_attention", "measure_attention", "plain_weights", "scatter_to_tokens"]

NUM_PICTURES = 3  # images, and
NUM_QUERIES = 3  # the best queries of each, whose points are drawn


@dataclass
class LayerAttention:
    """The cross-attention of a decoder layer, for one image. Means over the heads.

    Attributes:
        tokens: [S] what each token gets from all queries together.
        points: [Q, N, 2] where each query looks, (x, y) normalised by the image: its sampling points, or every cell.
        weights: [Q, N] what it gives to each of them.
    """

    tokens: Tensor
    points: Tensor
    weights: Tensor


def scatter_to_tokens(locations: Tensor, weights: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """What each token gets of deformable attention, from all queries and heads together.

    Args:
        locations: [B, Q, H, L, P, 2] sampling points (x, y), in fractions of each level's map.
        weights: [B, Q, H, L, P] attention weights.
        shapes: (height, width) of the levels.

    Returns:
        [B, S] float32. It adds up to the sum of the weights, but for those of points outside of their map.
    """
    # What reads a map bilinearly and adds up is linear in the map: its gradient is how much each cell counts.
    num_tokens = sum(height * width for height, width in shapes)
    with torch.enable_grad():
        value = weights.new_zeros(len(weights), num_tokens, weights.shape[2], 1, requires_grad=True)
        total = ms_deform_attn(value, shapes, locations.detach(), weights.detach(), "eager").sum()
        [shares] = torch.autograd.grad(total, value)
    return shares.sum(dim=(2, 3)).float()


def plain_weights(queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """The weights of scaled dot-product attention, mean over the heads.

    Args:
        queries, keys: [B, heads, Q, D] and [B, heads, S, D].
        mask: None, or bool that broadcasts to [B, heads, Q, S], True where a query may attend.

    Returns:
        [B, Q, S] float32; each row adds up to 1.
    """
    logits = queries.float() @ keys.float().mT / queries.shape[-1] ** 0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return logits.softmax(-1).mean(dim=1)


@contextmanager
def _recorded_inputs(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, tuple]]:
    """The positional arguments of the last call of each module."""
    inputs = {}
    hooks = [x.register_forward_pre_hook(lambda module, args: inputs.update({module: args})) for x in modules]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def cross_attention(model: nn.Module, memory: FeaturePyramid) -> tuple[DecoderOutput, list[LayerAttention]]:
    """The predictions of the matching queries at inference, and the cross-attention of every decoder layer.

    Args:
        model: a :class:`~codetr_d2.modeling.meta_arch.CoDETR`, not compiled.
        memory: the encoder's output for one image.
    """
    modules = [layer.cross_attn for layer in model.query_head.decoder.layers]
    with _recorded_inputs(modules) as inputs:
        output = model.predict(memory)
    return output, [_layer_attention(module, inputs[module], memory.geometry) for module in modules]


def _layer_attention(module: nn.Module, inputs: tuple, geometry: Geometry) -> LayerAttention:
    if isinstance(module, MultiScaleDeformableAttention):
        query, _, reference_boxes, shapes, _ = inputs
        locations, weights = module.points_and_weights(query, reference_boxes, shapes)
        tokens = scatter_to_tokens(locations, weights, shapes)[0] / module.num_heads
        # The valid part of a level is what shows the image.
        points = locations[0] / geometry.valid_ratios[0, :, None]  # [Q, H, L, P, 2]
        return LayerAttention(tokens, points.flatten(1, 3), weights[0].flatten(1) / module.num_heads)
    assert isinstance(module, ConditionalCrossAttention), type(module)
    *inputs, mask = inputs
    [weights] = plain_weights(*module.queries_and_keys(*inputs), mask)  # [Q, S]
    return LayerAttention(weights.sum(dim=0), geometry.cell_centres.expand(len(weights), -1, -1), weights)


def measure_attention(models: Iterable[AnalysedModel], num_images: int, output: Path) -> list[dict]:
    """Measure the attention score, and draw where the best queries of a few images look in the last layer.

    Beside the files of :func:`~codetr_d2.analysis.compare_maps.compare_maps`, whose arguments, result and errors these
    are, it writes ``attention_queries.png``.
    """
    pictures: dict[str, list] = {}  # by the model's name

    def maps_of(analysed: AnalysedModel, x: dict) -> dict[str, Tensor]:
        model, image_size = analysed.model, tuple(x["image"].shape[-2:])
        memory = model.encode(model.features(model.preprocess([x])))
        predictions, layers = cross_attention(model, memory)
        drawn = pictures.setdefault(analysed.name, [])
        if len(drawn) < NUM_PICTURES:
            picture = plots.to_rgb(x["image"], analysed.cfg.INPUT.FORMAT)
            drawn.append((picture, _best_queries(predictions, layers[-1], memory.geometry)))
        levels = levels_of_image(sum(layer.tokens for layer in layers), memory.geometry)
        return {"cross-attention": combine_levels(levels, memory.geometry.image_sizes[0], image_size)}

    rows = compare_maps(
        models,
        num_images,
        output,
        name="attention",
        maps_of=maps_of,
        title="How the decoder's cross-attention tells objects from background",
        map_label="attention score",
    )
    plots.draw_looks(output / "attention_queries.png", pictures)
    return rows


def _best_queries(output: DecoderOutput, layer: LayerAttention, geometry: Geometry) -> list[plots.Look]:
    """The queries with the highest scores, and where they look."""
    scores = output.logits[-1, 0].sigmoid().amax(dim=-1)  # [Q]
    size = geometry.image_sizes_xyxy[0]
    boxes = box_convert(output.boxes[-1, 0], "cxcywh", "xyxy") * size
    looks = []
    for query in scores.topk(min(NUM_QUERIES, len(scores))).indices.tolist():
        points, weights = layer.points[query] * size[:2], layer.weights[query]
        looks.append(plots.Look(scores[query].item(), boxes[query, None].cpu(), points.cpu(), weights.cpu()))
    return looks
