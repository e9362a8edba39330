"""An exported file in the place of the model: in detectron2's evaluation, in a predictor, beside the model itself."""

import importlib
import os
import tempfile
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..errors import InputError
from ..ops.library import library_is_loaded

__all__ = ["PROPOSALS", "ExportedDetector", "Session", "is_exported", "load_session", "optional", "session_of"]

PROPOSALS = "proposals"  # the name inside a file of the tokens that become queries, [B, Q] int64, by falling score

# Pictures by name -> what the graph makes of them.
Session = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def is_exported(file: str) -> bool:
    """Whether a file is one that :class:`ExportedDetector` runs, by its name."""
    return file.endswith((".onnx", ".xml"))


def optional(package: str) -> ModuleType:
    """Import a package that only exporting needs.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"{package} is not installed, which exported models need: run `python -m pip install {package}`, or "
            "`python -m pip install 'codetr_d2[export]'` for all that exporting needs"
        ) from error


def load_session(file: str, own_attention: bool = True, tells_proposals: bool = False) -> Session:
    """Load an exported file into its runtime: ONNX Runtime for ``.onnx``, OpenVINO for ``.xml``, on the CPU.

    Arithmetic that the file keeps in float32 is done in float32, whatever the processor prefers.

    Args:
        file: what tools/export.py wrote.
        own_attention: let OpenVINO call this project's deformable attention, which is faster than its own operators,
            where the project's compiled library is loaded.
        tells_proposals: give the value ``PROPOSALS`` too, of files of two-stage detectors.

    Raises:
        InputError: the file is missing or damaged, or the runtime is not installed.
    """
    if not os.path.isfile(file):
        raise InputError(f"{file} does not exist. tools/export.py writes such files.")
    try:
        if file.endswith(".onnx"):
            return _onnx_session(file, tells_proposals)
        return _openvino_session(file, own_attention, tells_proposals)
    except InputError:
        raise
    except Exception as error:  # whatever the runtime raises
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{file} can't be loaded: {line}. Export the model again.") from error


def _onnx_session(file: str, tells_proposals: bool) -> Session:
    runtime = optional("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if not tells_proposals:
        session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    else:  # only a file's outputs can be had; large weights are found beside it
        onnx = optional("onnx")
        model = onnx.load(file, load_external_data=False)
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(PROPOSALS))
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(os.path.abspath(file)), suffix=".onnx") as changed:
            onnx.save(model, changed.name)
            session = runtime.InferenceSession(changed.name, options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs)))


def _openvino_session(file: str, own_attention: bool, tells_proposals: bool) -> Session:
    openvino = optional("openvino")
    core = openvino.Core()
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = core.read_model(file)
    if tells_proposals:
        model.add_outputs(PROPOSALS)
    if own_attention and library_is_loaded():
        from .openvino_session import with_own_attention

        with_own_attention(model)
    return session_of(core.compile_model(model, "CPU", options))


def session_of(model: "openvino.CompiledModel") -> Session:  # noqa: F821
    """A model that OpenVINO has compiled, as a :data:`Session`."""
    names = [x.get_any_name() for x in model.outputs]

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = model(inputs)
        return {name: found[i].copy() for i, name in enumerate(names)}

    return run


class ExportedDetector(nn.Module):
    """Takes and gives what :class:`~codetr_d2.modeling.meta_arch.CoDETR` does at inference.

    Args:
        file: written by tools/export.py with its detections, ``.onnx`` or ``.xml``.
        input_format: of the images, ``INPUT.FORMAT``; the file reads RGB.
        session: what runs the file; by default :func:`load_session`.

    Attributes:
        proposals: the value ``PROPOSALS`` of the last batch, if the session tells it; or None.

    Raises:
        InputError: see :func:`load_session`; the file has no detections.
    """

    def __init__(self, file: str, input_format: str, session: Session | None = None):
        super().__init__()
        self.session = session or load_session(file)
        self.input_format = input_format
        self.file = file
        self.proposals: np.ndarray | None = None

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        images = [x["image"] for x in batched_inputs]
        sizes = [tuple(image.shape[-2:]) for image in images]
        found = self.session(self.pack(images))
        self.proposals = found.pop(PROPOSALS, None)
        if "scores" not in found:
            raise InputError(f"{self.file} has no detections: export it without --postprocess none")
        results = []
        for i, (size, x) in enumerate(zip(sizes, batched_inputs)):
            kept = found["scores"][i] > 0
            fields = {name: torch.from_numpy(values[i][kept]) for name, values in found.items()}
            result = Instances(size, pred_boxes=Boxes(fields["boxes"]), scores=fields["scores"])
            result.pred_classes = fields["classes"]
            if "masks" in fields:
                result.pred_masks = fields["masks"].unsqueeze(1)
            if "mask_scores" in fields:
                result.mask_scores = fields["mask_scores"]
            height, width = x.get("height", size[0]), x.get("width", size[1])
            results.append({"instances": detector_postprocess(result, height, width)})
        return results

    def pack(self, images: list[Tensor]) -> dict[str, np.ndarray]:
        """[C, H, W] pictures with values 0 to 255 -> the inputs of the file, padded to one size."""
        sizes = np.array([image.shape[-2:] for image in images], dtype=np.int64)
        batch = np.zeros((len(images), *sizes.max(0), images[0].shape[0]), dtype=np.uint8)
        for row, image in zip(batch, images):
            height, width = image.shape[-2:]
            row[:height, :width] = image.round().byte().permute(1, 2, 0).numpy()
        if self.input_format == "BGR":
            batch = np.ascontiguousarray(batch[..., ::-1])
        return {"images": batch, "sizes": sizes}
