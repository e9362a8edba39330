"""A trained model -> a file that runs without PyTorch, which has been compared with the model."""

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from sklearn.datasets import load_sample_images
from torch import Tensor

from ..data import CoDETRDatasetMapper, class_names, load_datasets, read_image, register_datasets
from ..data.datasets import annotated_images
from ..data.transforms import ResizeShortestEdge
from ..errors import InputError, named_disk_problems
from ..inference import Predictor, find_media
from ..inference.exported import ExportedDetector, Session, load_session
from ..modeling.meta_arch import CoDETR
from ..modeling.query_heads import TwoStageQueryHead
from .gate import average_precision, compare_on_pictures
from .metadata import metadata_of
from .parts import has_masks
from .torch_program import compile_program, export_program, program_session, program_sizes, save_program

__all__ = [
    "check_exported",
    "export_int8",
    "export_onnx",
    "export_torch",
    "load_model",
    "onnx_to_openvino",
    "registered",
]

MAX_AP = 0.1
MAX_AP_INT8 = 0.5
EXTERNAL = 1.8e9  # bytes of weights from which on they lie beside an .onnx file: protobuf ends at 2 GiB


def load_model(cfg: CfgNode) -> CoDETR:
    """The model of a config with its weights, in eval mode on the CPU, with nothing in it that cannot be exported.

    Raises:
        InputError: the config asks for something that has no exported form.
    """
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.CODETR.COMPILE = False
    cfg.MODEL.CODETR.INFERENCE_DTYPE = "float32"
    if cfg.MODEL.META_ARCHITECTURE != "CoDETR":
        raise InputError(f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}; only CoDETR can be exported")
    if cfg.MODEL.CODETR.EVAL_HEAD != "detr":
        raise InputError(
            f"MODEL.CODETR.EVAL_HEAD is {cfg.MODEL.CODETR.EVAL_HEAD}, but the detector alone can be exported: set it "
            "to detr"
        )
    if cfg.INPUT.FORMAT not in ("RGB", "BGR", "L"):
        raise InputError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT}; exported models read RGB, BGR or L")
    return Predictor(cfg).model


def export_onnx(cfg: CfgNode, model: CoDETR, folder: Path, config_file: str, postprocess: str = "auto") -> Path:
    """Write ``model.onnx`` into a folder.

    Args:
        cfg: of the model, whose datasets are registered where there are any.
        model: see :func:`load_model`.
        folder: is made.
        config_file: its name goes into the file.
        postprocess: see :func:`~codetr_d2.export.onnx_graph.build_onnx_model`; ``auto`` is soft-NMS where the config
            has it, and otherwise top-k.

    Raises:
        InputError: the folder cannot be written.
    """
    import onnx_ir as ir

    from .onnx_graph import build_onnx_model

    if postprocess == "auto":
        postprocess = "soft-nms" if model.query_head.soft_nms_thresh > 0 else "top-k"
    if postprocess == "soft-nms" and model.query_head.soft_nms_thresh == 0:
        raise InputError("--postprocess soft-nms: MODEL.CODETR.SOFT_NMS_THRESH is 0; set it, for instance to 0.8")
    graph = build_onnx_model(model, cfg.INPUT.FORMAT == "BGR", postprocess)
    graph.metadata_props.update(metadata_of(cfg, _class_names(cfg), config_file, postprocess))
    path = folder / "model.onnx"
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    with named_disk_problems(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        ir.save(graph, path, external_data="model.onnx.data" if size > EXTERNAL else None)
    return path


def _class_names(cfg: CfgNode) -> list[str]:
    try:
        return class_names(cfg)
    except (InputError, OSError):  # the annotations are not here, and the config does not name the classes
        return []


def onnx_to_openvino(onnx_file: Path) -> Path:
    """Write ``model.xml`` and ``model.bin`` beside an ONNX file, which is then removed."""
    from .openvino import write_openvino

    written = write_openvino(onnx_file, onnx_file.parent)
    for file in (onnx_file, onnx_file.with_name(f"{onnx_file.name}.data")):  # the weights of large models
        file.unlink(missing_ok=True)
    return written


def export_torch(
    cfg: CfgNode,
    model: CoDETR,
    folder: Path,
    config_file: str,
    pictures: Sequence[Path],
    is_compiled: bool = False,
    size: tuple[int, int] | None = None,
) -> list[Path]:
    """Write ``model.pt2``, and ``model_compiled.pt2`` where that is asked for, and compare what they find.

    Args:
        cfg, model, folder, config_file: see :func:`export_onnx`.
        pictures: see :func:`check_exported`.
        is_compiled: also compile it ahead of time.
        size: see :func:`~codetr_d2.export.torch_program.export_program`.

    Raises:
        InputError: see :func:`export_onnx`, :func:`check_exported` and ``export_program``; the model has soft-NMS.
    """
    if model.query_head.soft_nms_thresh > 0:
        raise InputError("a torch program has no soft-NMS: set MODEL.CODETR.SOFT_NMS_THRESH to 0 for the best pairs")
    if has_masks(model):
        raise InputError("a torch program has no masks: set MODEL.MASK_ON to False for the boxes alone")
    sizes = program_sizes(model, size)
    program = export_program(model, cfg.INPUT.FORMAT, size)
    metadata = {**metadata_of(cfg, _class_names(cfg), config_file), **sizes}
    files = [folder / "model.pt2"]
    with named_disk_problems(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
    save_program(program, files[0], metadata)
    check_exported(cfg, model, files[0], pictures, program_session(program.module(), sizes), sizes["size"])
    if is_compiled:
        files.append(folder / "model_compiled.pt2")
        compile_program(program, files[1], metadata)
        run = torch._inductor.aoti_load_package(str(files[1]))
        check_exported(cfg, model, files[1], pictures, program_session(run, sizes), sizes["size"])
    return files


def check_exported(
    cfg: CfgNode,
    model: CoDETR,
    file: Path,
    pictures: Sequence[Path],
    session: Session | None = None,
    size: tuple[int, int] | None = None,
) -> None:
    """Compare what an exported file finds with what the model finds, and print the differences.

    On pictures of several sizes and in batches of two sizes the detections have to be the same; on the config's first
    test dataset, where it is there, AP.

    Args:
        cfg: the config.
        model: what was exported, with its detections.
        file: what was written.
        pictures: files or folders to look for pictures in; without any, the first ones of the test dataset, and two
            photographs where there is none.
        session: what runs the file, if not its own runtime, as it is without this package.
        size: (height, width) of the largest picture that it takes, one at a time; None where it takes any.

    Raises:
        InputError: they differ by more than may be.
    """
    if session is None:
        is_two_stage = isinstance(model.query_head, TwoStageQueryHead)
        session = load_session(str(file), own_attention=False, tells_proposals=is_two_stage)
    exported = ExportedDetector(str(file), cfg.INPUT.FORMAT, session)
    print(f"{file} against PyTorch:")
    batches = _batches(cfg, _pictures(cfg, pictures))
    if size is not None:
        batches = (x for x in batches if len(x) == 1 and all(a <= b for a, b in zip(x[0].shape[1:], size)))
    problems = compare_on_pictures(model, exported, batches)
    problems += compare_ap(cfg, model, exported, MAX_AP)
    if problems:
        raise InputError(f"{file} does not find what the model finds: " + "; ".join(problems))


def export_int8(cfg: CfgNode, model: CoDETR, file: Path, num_pictures: int = 100) -> Path:
    """Write ``model_int8.xml`` beside an OpenVINO file, and print what it costs in AP.

    The ranges of values come from pictures of the training set, or of the test set where that one is not there; AP is
    that of the first test dataset.

    Args:
        cfg: the config.
        model: what was exported.
        file: the float32 file.
        num_pictures: for the ranges, at most.

    Raises:
        InputError: there is no test dataset, or AP falls by more than 0.5 whatever stays in float32.
    """
    from .openvino import quantize

    try:
        name = cfg.DATASETS.TEST[0]
        records = load_datasets(cfg, [name], is_train=False)
        if not annotated_images(name, cfg.MODEL.CODETR.NUM_CLASSES).is_annotated:
            raise InputError(f"{name} has no annotations")
    except (InputError, IndexError, OSError) as error:
        raise InputError(
            f"--int8 chooses by AP what stays in float32, but there is no test dataset: {error}"
        ) from error
    try:
        records = load_datasets(cfg, cfg.DATASETS.TRAIN[:1], is_train=False)
    except (InputError, OSError):
        print(f"  the training set is not there: ranges are those of {name}")
    mapper = CoDETRDatasetMapper(cfg, False)
    exported = ExportedDetector(str(file), cfg.INPUT.FORMAT)
    chosen = sorted(random.Random(0).sample(range(len(records)), min(num_pictures, len(records))))
    pictures = [exported.pack([mapper(records[i])["image"]]) for i in chosen]

    def score(session: Session) -> float:
        value = min(average_precision(cfg, ExportedDetector(str(file), cfg.INPUT.FORMAT, session)).values())
        print(f"  AP {value:.2f}", flush=True)
        return value

    # A little less, as the session that NNCF measures with may compute the other layers in bfloat16.
    written = quantize(file, pictures, score, MAX_AP_INT8 - MAX_AP)
    print(f"{written} against PyTorch:")
    session = load_session(str(written), own_attention=False)
    problems = compare_ap(cfg, model, ExportedDetector(str(written), cfg.INPUT.FORMAT, session), MAX_AP_INT8)
    if problems:
        raise InputError(f"{written}: {'; '.join(problems)}")
    return written


def compare_ap(cfg: CfgNode, model: CoDETR, exported: ExportedDetector, max_ap: float) -> list[str]:
    """Print AP of both on the test dataset, or that there is none; what is wrong with it."""
    try:
        if not cfg.DATASETS.TEST:
            raise InputError("DATASETS.TEST is empty")
        if not annotated_images(cfg.DATASETS.TEST[0], cfg.MODEL.CODETR.NUM_CLASSES).is_annotated:
            raise InputError(f"{cfg.DATASETS.TEST[0]} has no annotations")
    except (InputError, OSError) as error:
        print(f"  AP was not compared: {error}")
        return []
    problems = []
    ours_of, theirs_of = average_precision(cfg, model), average_precision(cfg, exported)
    for task, ours in ours_of.items():
        theirs = theirs_of[task]
        print(f"  {task} AP on {cfg.DATASETS.TEST[0]}: {ours:.2f} in PyTorch, {theirs:.2f} exported")
        if abs(ours - theirs) > max_ap:
            problems.append(f"{task} AP is {theirs:.2f} instead of {ours:.2f}, and may differ by {max_ap}")
    return problems


def _pictures(cfg: CfgNode, paths: Sequence[Path], number: int = 4) -> list[Tensor]:
    """Pictures [C, H, W] in the model's format, unresized."""
    if paths:
        files = [x.path for x in find_media(list(paths), Path(os.devnull))[0] if not x.is_video][:number]
    else:
        try:
            records = annotated_images(cfg.DATASETS.TEST[0], cfg.MODEL.CODETR.NUM_CLASSES).records
            files = [record["file_name"] for record in records[:number]]
        except (InputError, IndexError, OSError):
            files = load_sample_images().filenames
    images = [read_image(file, cfg.INPUT.FORMAT) for file in files]
    return [torch.from_numpy(x.reshape(*x.shape[:2], -1).transpose(2, 0, 1).copy()) for x in images]


def _batches(cfg: CfgNode, pictures: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Each picture as a test would see it, a part of one and one at two thirds, and two of different sizes together."""
    resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)

    def resized(picture: Tensor, scale: float = 1.0) -> Tensor:
        array = picture.permute(1, 2, 0).numpy()
        array = resize.get_transform(array).apply_image(array)
        if scale != 1:
            smaller = ResizeShortestEdge([max(1, round(min(array.shape[:2]) * scale))] * 2, 10**6)
            array = smaller.get_transform(array).apply_image(array)
        return torch.from_numpy(array.reshape(*array.shape[:2], -1).transpose(2, 0, 1).copy())

    yield from ([resized(picture)] for picture in pictures)
    yield [resized(pictures[0][:, : max(1, 2 * pictures[0].shape[1] // 3)])]
    yield [resized(pictures[-1], 2 / 3)]
    yield [resized(pictures[0]), resized(pictures[-1].transpose(1, 2), 0.8)]


def registered(cfg: CfgNode) -> CfgNode:
    """The config; its datasets are registered where their files are there."""
    try:
        register_datasets(cfg)
    except InputError as error:
        print(f"The datasets of the config are left out: {error}")
        cfg = cfg.clone()
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ()
    return cfg
