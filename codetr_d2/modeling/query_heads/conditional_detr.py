"""The query head of Co-Conditional-DETR."""

import torch
from detectron2.config import CfgNode, configurable
from torch import nn

from ..structures import QueryGroup
from ..transformer import perceptron
from .base import QUERY_HEAD_REGISTRY
from .single_level import SingleLevelQueryHead, single_level_arguments

__all__ = ["ConditionalDETRHead"]


@QUERY_HEAD_REGISTRY.register()
class ConditionalDETRHead(SingleLevelQueryHead):
    """Conditional DETR: each query learns a position, from which its reference point is predicted.

    A positive query of an auxiliary head has the centre of its candidate's box as reference point.

    Source: Conditional DETR (Meng et al., ICCV 2021), with the focal loss of classes as published.
    """

    OPTIONS_OF_SHAPES = {**SingleLevelQueryHead.OPTIONS_OF_SHAPES, "query_position": "MODEL.CODETR.NUM_QUERIES"}
    TELLING_PARAMETER = "query_position.weight"

    @configurable
    def __init__(self, **kwargs):
        """Args: kwargs: those of :class:`SingleLevelQueryHead`."""
        super().__init__(**kwargs)
        self.query_position = nn.Embedding(self.num_queries, self.embed_dim)
        self.point_head = perceptron(self.embed_dim, self.embed_dim, 2)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return single_level_arguments(cfg, temperature=10000.0, encoder={}, decoder={}, content_only=False)

    def matching_queries(self, batch_size: int) -> QueryGroup:
        """See the base class; the sides of the reference boxes, which the decoder does not use, are a half."""
        position = self.query_position.weight
        points = self.point_head(position).float().sigmoid()
        boxes = torch.cat((points, torch.full_like(points, 0.5)), dim=-1)
        position, boxes = (x.expand(batch_size, -1, -1) for x in (position, boxes))
        return QueryGroup(name="", content=torch.zeros_like(position), reference_boxes=boxes, position=position)
