"""The query head of Co-DAB-DETR."""

from detectron2.config import CfgNode, configurable
from torch import nn

from ..structures import QueryGroup
from .base import QUERY_HEAD_REGISTRY
from .single_level import SingleLevelQueryHead, single_level_arguments

__all__ = ["DABDETRHead"]


@QUERY_HEAD_REGISTRY.register()
class DABDETRHead(SingleLevelQueryHead):
    """DAB-DETR: each query is an anchor box, learned and then refined layer by layer.

    A positive query of an auxiliary head has its candidate's box as anchor box, and content that is made from it.

    Source: DAB-DETR (Liu et al., ICLR 2022).
    """

    OPTIONS_OF_SHAPES = {**SingleLevelQueryHead.OPTIONS_OF_SHAPES, "query_boxes": "MODEL.CODETR.NUM_QUERIES"}
    TELLING_PARAMETER = "query_boxes.weight"

    @configurable
    def __init__(self, **kwargs):
        """Args: kwargs: those of :class:`SingleLevelQueryHead`."""
        super().__init__(**kwargs)
        self.query_boxes = nn.Embedding(self.num_queries, 4)  # before the sigmoid

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return single_level_arguments(
            cfg,
            temperature=20.0,
            encoder={"scales_position": True, "prelu": True},
            decoder={"anchor_boxes": True},
            content_only=True,
        )

    def matching_queries(self, batch_size: int) -> QueryGroup:
        """See the base class."""
        boxes = self.query_boxes.weight.sigmoid().expand(batch_size, -1, -1)
        content = boxes.new_zeros((*boxes.shape[:2], self.embed_dim))
        return QueryGroup(name="", content=content, reference_boxes=boxes)
