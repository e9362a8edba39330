"""The interface of the auxiliary heads, and where they are registered."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..pyramid import FeaturePyramid
from ..structures import PositiveSamples

__all__ = ["AUX_HEAD_REGISTRY", "AnchorSizes", "AuxiliaryHead", "auxiliary_head_names", "build_auxiliary_head"]


class _AuxiliaryHeadRegistry(Registry):
    """A registry whose names may be given: ``@register("atss")`` on a class, beside ``@register()``."""

    def register(self, obj: Any = None) -> Any:
        if not isinstance(obj, str):
            return super().register(obj)

        def decorate(head: Callable) -> Callable:
            self._do_register(obj, head)
            return head

        return decorate


AUX_HEAD_REGISTRY = _AuxiliaryHeadRegistry("AUX_HEAD")
AUX_HEAD_REGISTRY.__doc__ = """
Registry of auxiliary heads: the names that ``MODEL.CODETR.AUX_HEADS`` may list.

A class is registered by ``@AUX_HEAD_REGISTRY.register("name")``, so that what it says of itself
(:mod:`codetr_d2.modeling.facts`) is known; a function by ``@AUX_HEAD_REGISTRY.register()``, under its own name.

The registered object is called with ``obj(cfg, input_shapes)``, where ``input_shapes`` is a list of ``ShapeSpec`` with
the channels and stride of each level of the head's pyramid, from fine to coarse. It returns an :class:`AuxiliaryHead`.
"""


@dataclass
class AnchorSizes:
    """The anchors of a head, by which it is told whether they suit the objects of a dataset.

    Attributes:
        option: the full name of the option that decides about them.
        sizes: [A, 2] float, their (width, height) in pixels of the network input.
        least_overlap: IoU with an object from which on an anchor can answer for it.
    """

    option: str
    sizes: Tensor
    least_overlap: float


class AuxiliaryHead(nn.Module):
    """A detection head on the encoder's output, with its own one-to-many assignment.

    In training it supervises the encoder and hands its candidates on to the decoder as customised positive queries. The
    detector's own inference never runs it (but for the masks of the ROI head's branch, where it has one);
    :meth:`inference` serves the evaluation of the branch by itself.

    The pyramid that it reads is the encoder's output with one coarser level appended, or five levels that are made of
    an encoder's single one.

    Source: paper, section 3.2, equations 1 to 3.
    """

    def forward(self, pyramid: FeaturePyramid, targets: list[Instances]) -> tuple[dict[str, Tensor], PositiveSamples]:
        """Losses and candidates of a batch in training.

        Args:
            pyramid: features of B images.
            targets: for each image the fields ``gt_boxes`` (xyxy pixels of the network input) and ``gt_classes``. An
                image may have no object.

        Returns:
            The losses, float32 scalars by their names, with the head's own weights: lambda_2 and the number of decoder
            layers (equation 6) are the caller's. Every parameter of the head is in their graph. Then the candidates.
        """
        raise NotImplementedError

    def candidates(self, pyramid: FeaturePyramid, targets: list[Instances]) -> PositiveSamples:
        """The candidates of :meth:`forward` alone, for lambda_2 = 0; override it where that is less work.

        The head's parameters need no gradient; the pyramid has one by the candidates' features.
        """
        return self(pyramid, targets)[1]

    def anchor_sizes(self) -> AnchorSizes | None:
        """The sizes of the head's anchors; None where it has none, or none that an option decides about."""
        return None

    def inference(self, pyramid: FeaturePyramid) -> list[Instances]:
        """The head's own detections of B images, to be called in eval mode.

        Returns:
            For each image the fields ``pred_boxes`` (xyxy pixels of the network input), ``scores``, ``pred_classes``,
            after non-maximum suppression, by falling score.
        """
        raise NotImplementedError

    def class_logits(self, pyramid: FeaturePyramid) -> list[Tensor]:
        """What the head makes of the classes, with its gradient, to be called in eval mode; for analyses.

        Returns:
            For each image [N, K] logits of the classes, background left out, of all that is scored before NMS.
        """
        raise NotImplementedError


def auxiliary_head_names(kinds: list[str]) -> list[str]:
    """Unique names for auxiliary heads: the kind itself, and with a number from its second use on."""
    return [
        kind if kinds[:i].count(kind) == 0 else f"{kind}{kinds[:i].count(kind) + 1}" for i, kind in enumerate(kinds)
    ]


def build_auxiliary_head(name: str, cfg: CfgNode, input_shapes: list[ShapeSpec]) -> AuxiliaryHead:
    """Build the auxiliary head that is registered as ``name``, which :meth:`CoDETR.check_options` has checked."""
    return AUX_HEAD_REGISTRY.get(name)(cfg, input_shapes)
