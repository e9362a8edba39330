"""The model for inference as parts of tensors alone, each of which ``torch.onnx.export`` takes at any sizes.

A whole model's sizes are nested roundings of the picture's, and the number of its tokens a sum of their products, which
torch's symbolic arithmetic takes hours for. A part sees the sizes of its inputs as new ones, unrelated to each other:
that is fast, and the parts put together are the model.

Shapes use B images, L feature levels, S tokens (all cells of all levels), C channels, Q queries, K classes, N
detections.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn
from torchvision.ops import box_convert

from ..modeling.masks.refine import refine_at_boundary
from ..modeling.meta_arch import CoDETR
from ..modeling.pyramid import FeaturePyramid, Geometry
from ..modeling.query_heads import TwoStageQueryHead
from ..modeling.structures import EncoderProposals
from .backbones import missing

__all__ = ["Decode", "Encode", "Finish", "Masks", "Neck", "Preprocess", "Select", "TracedGeometry", "has_masks"]


@dataclass(frozen=True, eq=False)
class TracedGeometry(Geometry):
    """A geometry of tensors: an exported program cannot know whether there is padding, so it always masks it.

    Attributes:
        token_padding: [B, S] bool, given where the tokens' number is not to be computed from the levels' sizes again.
    """

    token_padding: Tensor | None = None

    @classmethod
    def of_levels(
        cls,
        shapes: list[tuple[int, int]],
        strides: list[int],
        sizes: Tensor,
        batch_shape: Tensor,
        token_padding: Tensor | None = None,
    ) -> "TracedGeometry":
        """
        Args:
            shapes, strides: of the levels.
            sizes: [B, 2] int64, (height, width) of each image inside the padded batch.
            batch_shape: [2] int64, (height, width) of the padded batch.
            token_padding: see the class.
        """
        padding = [[_padding(sizes[:, i], batch_shape[i], shape[i]) for shape in shapes] for i in (0, 1)]
        return cls(shapes, strides, [], (0, 0), [], *padding, token_padding)

    @property
    def is_padded(self) -> bool:
        return True

    @property
    def value_mask(self) -> Tensor:
        return self.padding_mask if self.token_padding is None else self.token_padding


def _padding(sizes: Tensor, batch_size: Tensor, num_cells: int) -> Tensor:
    """[B, cells] bool, True in the padding along one side: as nearest interpolation of the pixels' mask gives it."""
    cells = torch.arange(num_cells, device=sizes.device).float()
    pixels = (cells * (batch_size.float() / num_cells)).floor()
    return pixels >= sizes[:, None].float()


def has_masks(model: CoDETR) -> bool:
    return model.mask_head is not None or model.roi_masks


class Preprocess(nn.Module):
    """Pictures -> what the backbone reads: normalised, with padding, or on their canvas.

    Args:
        model: to take the numbers from.
        reverse_channels: the model reads BGR.
    """

    def __init__(self, model: CoDETR, reverse_channels: bool):
        super().__init__()
        self.reverse_channels = reverse_channels
        self.on_canvas = model.canvas_size > 0
        self.padding_value = model.canvas_value if self.on_canvas else 0.0
        self.side = model.canvas_size or model.backbone.padding_constraints.get("square_size", 0)
        self.unit = model.size_divisibility
        self.register_buffer("pixel_mean", model.pixel_mean)
        self.register_buffer("pixel_std", model.pixel_std)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            images: [B, H, W, channels] uint8, RGB.
            sizes: [B, 2] int64, (height, width) of each picture; the rest of its row is padding of any value.

        Returns:
            [B, channels, H', W'] float32; [2] int64, (H', W'); [B, 2] int64, the (height, width) that counts as image.
        """
        height, width = images.shape[1:3]
        x = images.permute(0, 3, 1, 2)
        if self.reverse_channels:
            x = x.flip(1)
        x = x.float()
        rows = torch.arange(height, device=x.device) >= sizes[:, :1]
        columns = torch.arange(width, device=x.device) >= sizes[:, 1:]
        padding = (rows[:, None, :, None] | columns[:, None, None, :]).expand(-1, x.shape[1], -1, -1)
        if not self.on_canvas:
            x = (x - self.pixel_mean) / self.pixel_std
        x = torch.where(padding, self.padding_value, x)
        if self.side:
            x = F.pad(x, (0, self.side - width, 0, self.side - height), value=self.padding_value)
        elif self.unit > 1:
            x = F.pad(x, (0, missing(width, self.unit), 0, missing(height, self.unit)))
        if self.on_canvas:
            x = (x - self.pixel_mean) / self.pixel_std
        shape = torch.cat([sizes.new_full((1,), side) for side in x.shape[2:]])
        return x, shape, shape.expand(sizes.shape[0], -1) if self.on_canvas else sizes


class Neck(nn.Module):
    """The backbone's features -> levels [B, C, height, width], from fine to coarse."""

    def __init__(self, model: CoDETR):
        super().__init__()
        self.neck = model.neck

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return features if self.neck is None else self.neck(features)


class Encode(nn.Module):
    """Levels -> the encoder's output, and for two-stage heads what the queries are chosen from."""

    def __init__(self, model: CoDETR):
        super().__init__()
        self.model = model

    def forward(self, levels: list[Tensor], batch_shape: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            levels: what :class:`Neck` returns.
            batch_shape, sizes: what :class:`Preprocess` returns.

        Returns:
            [B, S, C] memory and [B, S] bool, its padding; of two-stage heads also [B, S] scores, [B, S, C] embeddings
            and [B, S, 4] prior boxes of the proposals; of models with masks then the memory as maps of each level.
        """
        head = self.model.query_head
        shapes = [tuple(x.shape[-2:]) for x in levels]
        geometry = TracedGeometry.of_levels(shapes, self.model.strides, sizes, batch_shape)
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in levels], dim=1)
        memory = head.encode(FeaturePyramid(tokens, geometry))
        outputs = (memory.tokens, geometry.padding_mask)
        if isinstance(head, TwoStageQueryHead):
            proposals = head.proposals(memory)
            outputs += (head.proposal_scores(proposals), proposals.embeddings, proposals.prior_logits)
        if has_masks(self.model):
            outputs += tuple(memory.maps())
        return outputs


class Decode(nn.Module):
    """The encoder's output and the chosen tokens -> raw predictions of the last layer."""

    def __init__(self, model: CoDETR):
        super().__init__()
        self.model = model

    def forward(
        self,
        levels: list[Tensor],
        batch_shape: Tensor,
        sizes: Tensor,
        memory: Tensor,
        padding: Tensor,
        index: Tensor | None = None,
        embeddings: Tensor | None = None,
        prior_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            levels: for their sizes alone.
            batch_shape, sizes: what :class:`Preprocess` returns.
            memory, padding, embeddings, prior_logits: what :class:`Encode` returns.
            index: [B, Q] int64, the tokens that become queries, by falling score.

        Returns:
            [B, Q, K] logits and [B, Q, 4] boxes, cxcywh in fractions of the image.
        """
        head = self.model.query_head
        shapes = [tuple(x.shape[-2:]) for x in levels]
        geometry = TracedGeometry.of_levels(shapes, self.model.strides, sizes, batch_shape, padding)
        if index is None:
            queries = head.matching_queries(memory.shape[0])
        else:
            proposals = EncoderProposals(logits=None, prior_logits=prior_logits, embeddings=embeddings)
            queries = head.matching_queries(head.proposals.box_logits(proposals, index).sigmoid())
        output = head.decoder([queries], FeaturePyramid(memory, geometry))[0]
        return output.logits[-1], output.boxes[-1]


class Select(nn.Module):
    """Raw predictions and the chosen pairs of query and class -> detections in pixels of the network input."""

    def forward(self, logits: Tensor, boxes: Tensor, index: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            logits, boxes: what :class:`Decode` returns.
            index: [B, N] int64 into the pairs of query and class, by falling score.
            sizes: [B, 2] the (height, width) that counts as image.

        Returns:
            [B, N, 4] boxes, xyxy clipped to the image; [B, N] scores; [B, N] int64 classes.
        """
        num_classes = logits.shape[-1]
        scores = logits.sigmoid().flatten(1).gather(1, index)
        query, classes = index // num_classes, index % num_classes
        boxes = box_convert(boxes, "cxcywh", "xyxy").gather(1, query.unsqueeze(-1).expand(-1, -1, 4))
        return _clip(boxes * _xyxy(sizes), sizes), scores, classes


class Finish(nn.Module):
    """Detections in pixels of the network input -> in the picture, which may be smaller."""

    def forward(
        self, boxes: Tensor, scores: Tensor, classes: Tensor, sizes: Tensor, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            boxes, scores, classes: of M detections, see :class:`Select`.
            sizes: [B, 2] (height, width) of the pictures.
            index: [B, N] those that are kept; without it, all.

        Returns:
            The detections, boxes clipped to the picture, the scores of those without area 0.
        """
        if index is not None:
            scores, classes = scores.gather(1, index), classes.gather(1, index)
            boxes = boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
        boxes = _clip(boxes, sizes)
        has_area = (boxes[..., 2:] > boxes[..., :2]).all(-1)
        return boxes, torch.where(has_area, scores, 0.0), classes


def _xyxy(sizes: Tensor) -> Tensor:
    """[B, 2] (height, width) -> [B, 1, 4] float32 (width, height, width, height)."""
    return sizes.flip(1).float().repeat(1, 2).unsqueeze(1)


def _clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    return torch.minimum(boxes.clamp(min=0), _xyxy(sizes))


class _Pooler(nn.Module):
    """detectron2's ``ROIPooler`` without its loop over the boxes of each level: it pools all boxes at every level.

    Args:
        pooler: what to pool like.
    """

    def __init__(self, pooler: ROIPooler):
        super().__init__()
        self.pooler = pooler

    def forward(self, maps: list[Tensor], rois: Tensor) -> Tensor:
        """Maps [B, C, h, w] and [R, 5] (image, xyxy in pixels) -> [R, C, *output_size]."""
        pooler = self.pooler
        pooled = [level(x, rois) for level, x in zip(pooler.level_poolers, maps)]
        if len(pooled) == 1:
            return pooled[0]
        sizes = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
        levels = (pooler.canonical_level + (sizes / pooler.canonical_box_size + 1e-8).log2()).floor()
        levels = levels.clamp(pooler.min_level, pooler.max_level) - pooler.min_level
        result = pooled[0]
        for i, x in enumerate(pooled[1:], 1):
            result = torch.where((levels == i)[:, None, None, None], x, result)
        return result


class Masks(nn.Module):
    """The masks of detections."""

    def __init__(self, model: CoDETR):
        super().__init__()
        if model.mask_head is not None:
            self.refine = copy.deepcopy(model.mask_head)
            self.refine.pooler = _Pooler(self.refine.pooler)
            self.refine.semantic_poolers = nn.ModuleList(_Pooler(x) for x in self.refine.semantic_poolers)
        else:
            heads = model.auxiliary_heads["roi"].roi_heads
            self.refine, self.pooler, self.head = None, _Pooler(heads.mask_pooler), heads.mask_head

    def forward(self, maps: list[Tensor], boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            maps: the encoder's output, [B, C, h, w].
            boxes, scores, classes: what :class:`Finish` returns.

        Returns:
            [B, N, s, s] probabilities inside the boxes; with the refining head also [B, N] scores of the masks.
        """
        batch, number = classes.shape
        images = torch.arange(batch, device=boxes.device, dtype=boxes.dtype)[:, None, None].expand(-1, number, -1)
        rois, labels = torch.cat((images, boxes), dim=2).flatten(0, 1), classes.flatten()
        if self.refine is None:
            logits = self.head.layers(self.pooler(maps, rois))
            if logits.shape[1] > 1:
                logits = logits.gather(1, labels[:, None, None, None].expand(-1, -1, *logits.shape[2:]))
            return (logits.sigmoid().view(batch, number, *logits.shape[2:]),)
        logits, ious = self.refine.predict(maps, self.refine.semantic_maps(maps), rois, labels)
        masks = refine_at_boundary(refine_at_boundary(logits[1], logits[2]), logits[3]).sigmoid()
        mask_scores = scores * ious.gather(1, labels[:, None]).view(batch, number)
        return masks.view(batch, number, *masks.shape[2:]), mask_scores
