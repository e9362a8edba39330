"""An ONNX file -> OpenVINO's, in float32 or int8."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import nncf
import numpy as np
import onnx_ir as ir
import openvino
import torch
from torchvision.ops import box_iou

from ..errors import named_disk_problems
from ..inference.exported import Session, load_session, session_of

__all__ = ["ADVANCED", "QUANTIZATION", "quantize", "write_openvino"]


# Boxes are clipped to the picture by minimum and maximum: in int8 their corners would fall on a grid of 256 lines,
# which cost up to 17 AP. NNCF knows transformers' other arithmetic, and leaves it in float32.
QUANTIZATION = {
    "model_type": nncf.ModelType.TRANSFORMER,
    "ignored_scope": nncf.IgnoredScope(types=["Minimum", "Maximum"], validate=False),
}
# Without SmoothQuant, which multiplies features before each product, and changed AP by -0.2 to 0.3.
ADVANCED = nncf.AdvancedQuantizationParameters(
    smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
)


def write_openvino(onnx_file: Path, folder: Path) -> Path:
    """Write ``model.xml`` and ``model.bin`` into a folder; what the ONNX file says of itself is their ``rt_info``.

    Raises:
        InputError: the folder cannot be written.
    """
    model = openvino.convert_model(onnx_file)
    for key, value in ir.load(onnx_file).metadata_props.items():
        model.set_rt_info(value, ["codetr_d2", key])
    return _save(model, folder / "model.xml")


def _save(model: openvino.Model, file: Path) -> Path:
    with named_disk_problems(str(file.parent)):
        file.parent.mkdir(parents=True, exist_ok=True)
        openvino.save_model(model, file, compress_to_fp16=False)
    return file


def quantize(
    file: Path,
    pictures: Sequence[dict[str, np.ndarray]],
    score: Callable[[Session], float],
    max_drop: float,
    num_ranking: int = 20,
) -> Path:
    """Write ``model_int8.xml`` beside a file of :func:`write_openvino`: matrix products and convolutions in int8.

    NNCF takes the ranges of all values from pictures. Where the score then falls by too much, it measures by how much
    each operator changes the detections, and puts the worst ones back into float32 until the score is near enough.

    Args:
        file: of the float32 model.
        pictures: inputs of the file, for the ranges; the changes are measured on the first ``num_ranking`` of them.
        score: of a session, higher is better.
        max_drop: of the score.
        num_ranking: see ``pictures``.

    Raises:
        InputError: the folder cannot be written.
    """

    reference = load_session(str(file), own_attention=False)
    expected = {id(inputs): reference(inputs) for inputs in pictures}

    def validate(model: openvino.CompiledModel, items: Iterable) -> tuple[float, list[float]]:
        session = session_of(model)
        items = list(items)
        likeness = [_likeness(expected[id(inputs)], session(inputs)) for inputs in items]
        is_ranking = len(items) < len(pictures)
        return 0.0 if is_ranking else score(session), likeness

    data = nncf.Dataset(pictures)
    model = nncf.quantize_with_accuracy_control(
        openvino.Core().read_model(file),
        calibration_dataset=data,
        validation_dataset=data,
        validation_fn=validate,
        max_drop=max_drop,
        subset_size=len(pictures),
        advanced_quantization_parameters=ADVANCED,
        advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(ranking_subset_size=num_ranking),
        **QUANTIZATION,
    )
    return _save(model, file.with_name("model_int8.xml"))


def _likeness(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """How much of the detections of ``one`` is in ``other``: 1 for all of it, with the same boxes and scores."""
    boxes, scores, classes = (torch.from_numpy(one[x][0]) for x in ("boxes", "scores", "classes"))
    others, other_scores, other_classes = (torch.from_numpy(other[x][0]) for x in ("boxes", "scores", "classes"))
    likeness = box_iou(boxes, others) * (1 - (scores[:, None] - other_scores).abs())
    likeness = likeness.nan_to_num() * (classes[:, None] == other_classes)
    return float((likeness.amax(1) * scores).sum() / scores.sum())
