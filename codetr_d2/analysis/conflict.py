"""How far apart the heads look: divergences between their Grad-CAM maps on the encoder's output (paper, eqs. 9, 10)."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import InputError
from ..modeling.pyramid import FeaturePyramid
from . import plots
from .models import AnalysedModel, images
from .results import write_rows

__all__ = ["attention_of_heads", "conflict_of_head", "distribution", "grad_cam", "kl_divergence", "measure_conflict"]

DETECTOR = "detector"
NUM_DETECTIONS = 20  # the best ones of a head, whose logits are its score


def grad_cam(levels: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Grad-CAM: the features weighted by the mean gradient of their channel, where that is positive.

    The weights of the channels are means over the cells of a level, each level having its own. Source: Selvaraju et
    al., ICCV 2017, equations 1 and 2.

    Args:
        levels: features of one image, [S_l, C] for each level.
        gradients: of a score by these.

    Returns:
        [S], not negative, level by level.
    """
    return torch.cat([(x * g.mean(dim=0)).sum(dim=1).relu() for x, g in zip(levels, gradients)])


def distribution(values: Tensor) -> Tensor:
    """A map as a distribution: the softmax over its cells of its values, divided by the largest.

    The paper does not say what it does. This keeps every divergence finite, and gives values of the paper's size:
    hundredths of a nat. Shares of the map's sum would give whole nats.

    Args:
        values: [S] not negative.

    Returns:
        [S] float64, without zeros, whose sum is 1.
    """
    values = values.double()
    return (values / values.max().clamp(min=torch.finfo(values.dtype).tiny)).softmax(dim=0)


def kl_divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) in nats of two distributions without zeros."""
    return (p * (p / q).log()).sum().item()


def conflict_of_head(matrix: Tensor) -> Tensor:
    """[H, H] S_ij of H heads -> [H] S_i, the mean of all S_ij and S_ji with j other than i (paper, eq. 10)."""
    others = matrix - matrix.diag().diag()
    return (others.sum(dim=0) + others.sum(dim=1)) / (2 * (len(matrix) - 1))


def attention_of_heads(model: nn.Module, model_input: dict) -> dict[str, Tensor]:
    """Where the detector and each auxiliary head look on one image: [S] distributions over the encoder's cells.

    The score of a head is the sum of the best class logits of its 20 best predictions; of the ROI head, whose classes
    compete, logits count against that of background. Cells in the padding are left out.

    Args:
        model: in eval mode.
        model_input: as the model takes it.
    """
    with torch.no_grad():
        memory = model.encode(model.features(model.preprocess([model_input])))
    tokens = memory.tokens.detach().requires_grad_()
    sizes, valid = memory.geometry.level_sizes, ~memory.geometry.padding_mask[0]

    def levels(x: Tensor) -> list[Tensor]:
        return [level[kept] for level, kept in zip(x.split(sizes), valid.split(sizes))]

    found = {}
    for name in (DETECTOR, *model.auxiliary_heads):
        with torch.enable_grad():
            best = _class_logits(model, name, memory.with_tokens(tokens)).amax(dim=1)
            score = best.topk(min(NUM_DETECTIONS, len(best))).values.sum()
        (gradient,) = torch.autograd.grad(score, tokens, allow_unused=True)
        gradient = torch.zeros_like(tokens) if gradient is None else gradient
        found[name] = distribution(grad_cam(levels(tokens.detach()[0]), levels(gradient[0])))
    return found


def _class_logits(model: nn.Module, name: str, memory: FeaturePyramid) -> Tensor:
    if name == DETECTOR:
        return model.predict(memory).logits[-1, 0]
    return model.auxiliary_heads[name].class_logits(model.auxiliary_pyramid(memory))[0]


def measure_conflict(models: Iterable[AnalysedModel], num_images: int, output: Path) -> list[dict]:
    """Measure S_ij between all heads of each model, and S_i.

    Writes ``conflict.png``, ``conflict.json`` and ``conflict.csv``.

    Args:
        models: what to compare, each with auxiliary heads.
        num_images: how many images of the test dataset.
        output: a folder that exists.

    Returns:
        A row for each model and pair of heads: ``model``, ``head`` (i), ``to`` (j), ``S_ij``, ``S_i``, ``images``.

    Raises:
        InputError: a model has no auxiliary head.
    """
    rows, matrices = [], {}
    for analysed in models:
        names = [DETECTOR, *analysed.model.auxiliary_heads]
        if len(names) == 1:
            raise InputError(
                f"{analysed.name} has no auxiliary heads (MODEL.CODETR.AUX_HEADS is empty) to compare with"
            )
        sums, count = torch.zeros(len(names), len(names), dtype=torch.float64), 0
        for x in tqdm(images(analysed, num_images), desc=analysed.name):
            found = attention_of_heads(analysed.model, x)
            sums += torch.tensor([[kl_divergence(found[i], found[j]) for j in names] for i in names])
            count += 1
        matrix = sums / count
        matrices[f"{analysed.name}, {count} images"] = (names, matrix)
        rows += [
            {"model": analysed.name, "head": i, "to": j, "S_ij": matrix[a, b].item(), "S_i": s.item(), "images": count}
            for a, (i, s) in enumerate(zip(names, conflict_of_head(matrix)))
            for b, j in enumerate(names)
            if i != j
        ]
    write_rows(output, "conflict", rows)
    plots.draw_matrices(
        output / "conflict.png",
        matrices,
        title="How far apart the heads look: mean KL(row || column) of their Grad-CAM maps, in nats",
        row_label="head i",
        column_label="head j",
    )
    return rows
