"""Models in other runtimes than PyTorch: ours as tools/export.py writes it, transformers' as OpenVINO converts it."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import nn

from codetr_d2.errors import InputError
from codetr_d2.export.packages import check_packages
from codetr_d2.inference.exported import ExportedDetector, load_session

__all__ = ["RUNTIMES", "hf_in_openvino", "in_runtime", "runtime_of"]

# And the packages that they need. int8 is OpenVINO with the project's deformable attention, as a Predictor runs it.
RUNTIMES = {"onnxruntime": "onnx", "openvino": "openvino", "openvino-int8": "int8", "int8": "int8"}


def runtime_of(against: list[str]) -> str | None:
    """The runtime that is asked for, or none.

    Raises:
        InputError: its packages are not installed.
    """
    for name in against:
        if name in RUNTIMES:
            check_packages(RUNTIMES[name])
            return name
    return None


def in_runtime(model: nn.Module, runtime: str, cfg: CfgNode, batch: list[dict]) -> ExportedDetector:
    """Our model, exported.

    Args:
        model: in eval mode, on the CPU.
        runtime: one of ``RUNTIMES``. int8 has every layer that NNCF quantises, and its ranges from ``batch``.
        cfg: of the model.
        batch: what it will be run on.
    """
    import onnx_ir as ir

    from codetr_d2.export.onnx_graph import build_onnx_model

    postprocess = "soft-nms" if model.query_head.soft_nms_thresh > 0 else "top-k"
    graph = build_onnx_model(model, cfg.INPUT.FORMAT == "BGR", postprocess)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        ir.save(graph, file)
        if runtime == "onnxruntime":
            return ExportedDetector(str(file), cfg.INPUT.FORMAT)
        from codetr_d2.export.openvino import write_openvino

        file = write_openvino(file, Path(folder))
        plain = ExportedDetector(str(file), cfg.INPUT.FORMAT, load_session(str(file), own_attention=False))
        if runtime == "openvino":
            return plain
        _quantize(file, [plain.pack([x["image"] for x in batch])])
        session = load_session(str(file), own_attention=runtime == "int8")
        return ExportedDetector(str(file), cfg.INPUT.FORMAT, session)


def hf_in_openvino(model: nn.Module, runtime: str, batch: list[dict]) -> nn.Module:
    """transformers' Deformable DETR, see :class:`~benchmarks.against.DeformableDETR`, as OpenVINO converts it.

    Raises:
        InputError: another runtime.
    """
    if runtime == "onnxruntime":
        raise InputError("--against hf+onnxruntime: hf goes with openvino and openvino-int8")
    import openvino

    pixels = torch.stack([x["image"] for x in batch]).float() / 255
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.xml"
        openvino.save_model(
            openvino.convert_model(model.model, example_input={"pixel_values": pixels}), file, compress_to_fp16=False
        )
        if runtime == "openvino-int8":
            _quantize(file, [{"pixel_values": pixels.numpy()}])
        session = load_session(str(file))

    class Detector(nn.Module):
        def forward(self, batched_inputs: list[dict]) -> dict[str, np.ndarray]:
            images = torch.stack([x["image"] for x in batched_inputs])
            return session({"pixel_values": (images.float() / 255).numpy()})

    return Detector()


def _quantize(file: Path, pictures: list[dict[str, np.ndarray]]) -> None:
    """Replace an OpenVINO file by one in int8."""
    import nncf
    import openvino

    from codetr_d2.export.openvino import ADVANCED, QUANTIZATION

    model = nncf.quantize(
        openvino.Core().read_model(file),
        nncf.Dataset(pictures),
        advanced_parameters=ADVANCED,
        **QUANTIZATION,
    )
    quantized = file.with_name("quantized.xml")
    openvino.save_model(model, quantized, compress_to_fp16=False)
    del model
    for suffix in (".xml", ".bin"):
        quantized.with_suffix(suffix).replace(file.with_suffix(suffix))
