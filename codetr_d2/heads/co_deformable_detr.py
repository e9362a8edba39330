"""The query head of Co-Deformable-DETR: encoder, proposals, queries and decoder."""

import dataclasses

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor, nn

from ..assigners.hungarian import HungarianMatcher
from ..criterion import SetCriterion
from ..layers import SinePositionEncoding, sine_embedding
from ..postprocess import detections_from_queries
from ..queries import PositiveQueries, TwoStageProposals
from ..structures import DecoderOutput, EncoderProposals, FeaturePyramid, PositiveSamples, QueryGroup
from ..transformer import DeformableDecoder, DeformableEncoder
from .query_head import QUERY_HEAD_REGISTRY

__all__ = ["CoDeformableDETRHead"]


@QUERY_HEAD_REGISTRY.register()
class CoDeformableDETRHead(nn.Module):
    """Two-stage Deformable DETR with mixed query selection and box refinement, and with positive queries in training.

    Args:
        encoder, decoder: the transformer.
        position_encoding: of the feature maps' cells.
        proposals: predicts class and box at every token of the encoder.
        positive_queries: one module for each auxiliary head.
        criterion: the losses.
        embed_dim: channels.
        num_queries: number of matching queries.
        max_detections: detections of each image at inference.
        positive_weight: weight of the losses of the positive queries (lambda_1 in eq. 6).
    """

    @configurable
    def __init__(
        self,
        *,
        encoder: DeformableEncoder,
        decoder: DeformableDecoder,
        position_encoding: SinePositionEncoding,
        proposals: TwoStageProposals,
        positive_queries: list[PositiveQueries],
        criterion: SetCriterion,
        embed_dim: int,
        num_queries: int,
        max_detections: int,
        positive_weight: float = 1.0,
    ):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.position_encoding = position_encoding
        self.proposals = proposals
        self.positive_queries = nn.ModuleList(positive_queries)
        self.criterion = criterion
        self.embed_dim = embed_dim
        self.num_queries = num_queries
        self.max_detections = max_detections
        self.positive_weight = positive_weight
        self.query_content = nn.Embedding(num_queries, embed_dim)
        self.box_proj = nn.Linear(2 * embed_dim, 2 * embed_dim)
        self.box_norm = nn.LayerNorm(2 * embed_dim)
        nn.init.xavier_uniform_(self.box_proj.weight)
        nn.init.zeros_(self.box_proj.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        options = cfg.MODEL.CODETR
        dim, num_classes = options.EMBED_DIM, options.NUM_CLASSES

        def transformer_args(part: CfgNode) -> dict:
            return {
                "embed_dim": dim,
                "num_layers": part.NUM_LAYERS,
                "num_heads": part.NUM_HEADS,
                "num_levels": options.NUM_FEATURE_LEVELS,
                "num_points": part.NUM_POINTS,
                "ffn_dim": part.FFN_DIM,
                "dropout": part.DROPOUT,
                "activation_checkpointing": options.ACTIVATION_CHECKPOINTING,
            }

        positives = options.POSITIVE_QUERIES
        return {
            "encoder": DeformableEncoder(**transformer_args(options.ENCODER)),
            "decoder": DeformableDecoder(num_classes=num_classes, **transformer_args(options.DECODER)),
            "position_encoding": SinePositionEncoding(dim, temperature=10000.0, offset=-0.5),
            "proposals": TwoStageProposals(dim, num_classes),
            "positive_queries": [
                PositiveQueries(
                    dim, num_classes, positives.MAX_PER_HEAD, positives.MIN_PER_HEAD, padding=positives.PADDING
                )
                for _ in options.AUX_HEADS
            ],
            "criterion": SetCriterion(
                num_classes,
                HungarianMatcher(options.COST_CLS, options.COST_BOX, options.COST_GIOU),
                weight_cls=options.LOSS_CLS,
                weight_box=options.LOSS_BOX,
                weight_giou=options.LOSS_GIOU,
            ),
            "embed_dim": dim,
            "num_queries": options.NUM_QUERIES,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            "positive_weight": options.LAMBDA1,
        }

    @property
    def num_decoder_layers(self) -> int:
        return len(self.decoder.layers)

    def encode(self, pyramid: FeaturePyramid) -> FeaturePyramid:
        """The neck's output -> the encoder's output, of the same shape."""
        masks = pyramid.padding_mask.split([h * w for h, w in pyramid.shapes], dim=1)
        position = [self.position_encoding(m.unflatten(1, shape)) for m, shape in zip(masks, pyramid.shapes)]
        return dataclasses.replace(pyramid, tokens=self.encoder(pyramid, torch.cat(position, dim=1)))

    def losses(
        self, memory: FeaturePyramid, samples: dict[str, PositiveSamples], instances: list[Instances]
    ) -> dict[str, Tensor]:
        """
        Args:
            memory: the encoder's output.
            samples: the candidates of each auxiliary head, by its name.
            instances: the ground truth of each image, boxes in pixels of the network input.

        Returns:
            The losses of :class:`SetCriterion`, those of the positive queries with ``_aux_<head>`` in their names.
        """
        proposals = self.proposals(memory)
        groups = [self.matching_queries(proposals)]
        for head, module in zip(samples, self.positive_queries):
            groups.append(module(samples[head], memory.image_sizes_xyxy, name=f"_aux_{head}"))
        losses = self.criterion(self.decoder(groups, memory), proposals, memory, instances)
        return {k: v * self.positive_weight if "_aux_" in k else v for k, v in losses.items()}

    def inference(self, memory: FeaturePyramid) -> list[Instances]:
        """The detections of each image, in pixels of the network input."""
        output = self.predict(memory)
        return detections_from_queries(output.logits[-1], output.boxes[-1], memory.image_sizes, self.max_detections)

    def predict(self, memory: FeaturePyramid) -> DecoderOutput:
        """Predictions of every decoder layer for the matching queries alone."""
        return self.decoder([self.matching_queries(self.proposals(memory))], memory)[0]

    def best_proposals(self, proposals: EncoderProposals) -> Tensor:
        """[B, Q] indices of the tokens with the largest logits of class 0, which the encoder learns as objectness."""
        num_tokens = proposals.logits.shape[1]
        return proposals.logits[..., 0].topk(min(self.num_queries, num_tokens), dim=1).indices

    def matching_queries(self, proposals: EncoderProposals) -> QueryGroup:
        """Mixed query selection: positions from the best proposals, learned content."""
        index = self.best_proposals(proposals)
        box_logits = proposals.box_logits.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
        boxes = box_logits.detach().sigmoid()
        position = self.box_norm(self.box_proj(sine_embedding(boxes, self.embed_dim // 2)))[..., : self.embed_dim]
        content = self.query_content.weight[: index.shape[1]].expand(len(index), -1, -1)
        return QueryGroup(name="", content=content, reference_boxes=boxes, position=position)
