"""What query heads on a single feature level have in common: the plain encoder, and queries learned of themselves."""

from detectron2.config import CfgNode

from ...errors import InputError
from ...layers import SinePositionEncoding
from ..pyramid import FeaturePyramid
from ..structures import DecoderOutput, QueryGroup
from ..transformer import ConditionalDecoder, PlainEncoder
from .base import QueryHead, query_head_arguments

__all__ = ["SingleLevelQueryHead", "single_level_arguments"]


class SingleLevelQueryHead(QueryHead):
    """A DETR with plain attention to one feature level and without proposals.

    A subclass says how its learned queries look (:meth:`matching_queries`). At first they have no content; where they
    look is what they learn.

    Args:
        num_queries: number of matching queries.
        kwargs: those of :class:`QueryHead`.
    """

    OPTIONS_OF_SHAPES = {
        f"{part}.layers.*.ffn": f"MODEL.CODETR.{part.upper()}.FFN_DIM" for part in ("encoder", "decoder")
    }
    OPTIONS_OF_NAMES = {f"{part}.layers": f"MODEL.CODETR.{part.upper()}.NUM_LAYERS" for part in ("encoder", "decoder")}

    @classmethod
    def check_options(cls, cfg: CfgNode) -> None:
        super().check_options(cfg)
        options = cfg.MODEL.CODETR
        if options.NUM_FEATURE_LEVELS != 1:
            raise InputError(
                f"MODEL.CODETR.NUM_FEATURE_LEVELS is {options.NUM_FEATURE_LEVELS}, but {options.QUERY_HEAD} has plain "
                "attention to a single level: set it to 1, and MODEL.CODETR.IN_FEATURES to one feature"
            )

    def __init__(self, *, num_queries: int, **kwargs):
        super().__init__(**kwargs)
        self.num_queries = num_queries

    def encode(self, pyramid: FeaturePyramid) -> FeaturePyramid:
        """See the base class; the output has the shape of the input."""
        return pyramid.with_tokens(self.encoder(pyramid))

    def queries_and_proposals(self, memory: FeaturePyramid) -> tuple[QueryGroup, DecoderOutput | None]:
        """See the base class; there are no proposals."""
        return self.matching_queries(memory.tokens.shape[0]), None

    def matching_queries(self, batch_size: int) -> QueryGroup:
        """The matching queries, the same for every image."""
        raise NotImplementedError


def single_level_arguments(
    cfg: CfgNode, *, temperature: float, encoder: dict, decoder: dict, content_only: bool
) -> dict:
    """What the config says of any query head on a single level, as arguments of :class:`SingleLevelQueryHead`.

    Args:
        cfg: the config.
        temperature: base of the wavelengths of the cells' position encoding.
        encoder, decoder: further arguments of these, in which the query heads differ.
        content_only: see :class:`PositiveQueries`.
    """
    options = cfg.MODEL.CODETR

    def transformer_args(part: CfgNode) -> dict:
        return {
            "position_encoding": SinePositionEncoding(options.EMBED_DIM, temperature, offset=0.0),
            "embed_dim": options.EMBED_DIM,
            "num_layers": part.NUM_LAYERS,
            "num_heads": part.NUM_HEADS,
            "ffn_dim": part.FFN_DIM,
            "dropout": part.DROPOUT,
            "activation_checkpointing": options.ACTIVATION_CHECKPOINTING,
        }

    return {
        "encoder": PlainEncoder(**transformer_args(options.ENCODER), **encoder),
        "decoder": ConditionalDecoder(num_classes=options.NUM_CLASSES, **transformer_args(options.DECODER), **decoder),
        "num_queries": options.NUM_QUERIES,
        **query_head_arguments(cfg, criterion={}, content_only=content_only),
    }
