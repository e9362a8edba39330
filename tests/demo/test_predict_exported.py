import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import openvino
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.structures import Boxes, Instances, ROIMasks
from matplotlib import font_manager
from onnx import TensorProto, helper
from PIL import Image
from pycocotools import mask as mask_util

import codetr_d2.data
from codetr_d2.data.transforms import ResizeShortestEdge
from codetr_d2.modeling.meta_arch import clip_to_image, rescale
from codetr_d2.visualization import draw_predictions
from codetr_d2_programs import predict
from tests.tiny_run import write_tiny_run

DEMO = Path(__file__).parents[2] / "demo"
NAMES = ["a cat", "Hände & Füße <\"'>", "x" * 300]
MIN_SIZE, MAX_SIZE = 96, 128


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, DEMO / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def exported():
    """demo/predict_exported.py, with the font that the package finds, which may be another version of the system's."""
    module = load("predict_exported")
    module.FONT = font_manager.findfont("DejaVu Sans")
    return module


def random_boxes(number: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """[N, 4] float32 xyxy, some outside of the picture, every other one between half pixels."""
    corners = np.random.default_rng(seed).uniform(-0.2, 1.2, (number, 2, 2)) * (width, height)
    corners[::2] = np.round(corners[::2] * 2) / 2
    return np.concatenate((corners.min(1), corners.max(1)), axis=1).astype(np.float32)


def random_outputs(number: int = 40, side: int | None = None, mask_scores: bool = False) -> dict[str, np.ndarray]:
    """What a model gives for a picture of about 96 x 128 pixels; boxes without area have score 0."""
    random = np.random.default_rng(1)
    boxes = random_boxes(number, 90, 120).clip(0, (120, 90, 120, 90)).astype(np.float32)
    boxes[5:7, 2] = boxes[5:7, 0]
    scores = np.sort(random.random(number, dtype=np.float32))[::-1].copy()
    scores[(boxes[:, 2:] <= boxes[:, :2]).any(1)] = 0
    outputs = {"boxes": boxes, "scores": scores, "classes": random.integers(0, len(NAMES) + 1, number)}
    if side:
        coarse = random.random((number, 5, 5), dtype=np.float32)
        outputs["masks"] = np.stack([cv2.resize(x, (side, side)) for x in coarse])
    if mask_scores:
        outputs["mask_scores"] = scores * np.float32(0.7)
    return outputs


def make_model(nodes: list, inputs: list, outputs: list) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "test", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def write_model(file: Path, outputs: dict[str, np.ndarray], channels: int = 3, **metadata: str) -> None:
    """A model.onnx or model.xml that gives the outputs for any picture."""
    nodes, values = [], []
    for name, array in outputs.items():
        constant = onnx.numpy_helper.from_array(array[None])
        nodes.append(helper.make_node("Constant", [], [name], value=constant))
        values.append(helper.make_tensor_value_info(name, constant.data_type, constant.dims))
    inputs = [
        helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", "height", "width", channels]),
        helper.make_tensor_value_info("sizes", TensorProto.INT64, ["batch", 2]),
    ]
    model = make_model(nodes, inputs, values)
    properties = {"class_names": json.dumps(NAMES), "min_size": str(MIN_SIZE), "max_size": str(MAX_SIZE), **metadata}
    helper.set_model_props(model, properties)
    if file.suffix == ".onnx":
        onnx.save(model, file)
        return
    onnx.save(model, file.with_suffix(".onnx"))
    model = openvino.convert_model(file.with_suffix(".onnx"))
    for key, value in properties.items():
        model.set_rt_info(value, ["codetr_d2", key])
    openvino.save_model(model, file, compress_to_fp16=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a model for each runtime, with masks that have scores of their own."""
    folder = tmp_path_factory.mktemp("models")
    outputs = random_outputs(side=28, mask_scores=True)
    for name in ("model.onnx", "model.xml"):
        write_model(folder / name, outputs)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of pictures of many kinds, a video, and what is neither."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "inner" / ".hidden").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    picture = Image.fromarray(cv2.resize(pixels, (130, 90), interpolation=cv2.INTER_CUBIC))
    for orientation in range(1, 10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(folder / f"exif{orientation}.jpg", exif=exif)
    picture.save(folder / "exif1.png")  # its drawing has the name of another's
    picture.save(folder / "EXIF2.png")  # likewise, where systems take no notice of case
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("L").save(folder / "grey.png")
    picture.resize((900, 40)).save(folder / "wide.webp")
    picture.quantize(16).save(folder / "palette.png", transparency=3)
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 13).save(folder / "deep.tif")
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.float32) / 255).save(folder / "float.tif")
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.float32) * 1000).save(folder / "bright.tif")
    picture.save(folder / "inner" / "no_suffix", format="png")
    picture.save(folder / "inner" / ".hidden" / "x.png")
    (folder / "notes.txt").write_text("no picture")
    video = cv2.VideoWriter(str(folder / "video.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (65, 49))
    for i in range(3):
        video.write(np.full((49, 65, 3), 80 * i, np.uint8))
    video.release()
    return folder


def instances_of(outputs: dict[str, np.ndarray], model_input: dict) -> Instances:
    """What ``CoDETR`` gives where its heads predict the outputs."""
    fields = {name: torch.from_numpy(array) for name, array in outputs.items()}
    result = Instances(tuple(model_input["image"].shape[-2:]), pred_boxes=Boxes(fields["boxes"].clone()))
    result.scores, result.pred_classes = fields["scores"], fields["classes"]
    if "masks" in fields:
        result.pred_masks = ROIMasks(fields["masks"])
    if "mask_scores" in fields:
        result.mask_scores = fields["mask_scores"]
    return rescale(clip_to_image(result, model_input["image"]), model_input)


class StubPredictor:
    """The package's ``Predictor`` with a model that finds the same in every picture."""

    def __init__(self, cfg):
        self.outputs = random_outputs(side=28, mask_scores=True)

    def __call__(self, image):
        height, width = image.shape[:2]
        resize = ResizeShortestEdge([MIN_SIZE, MIN_SIZE], MAX_SIZE).get_transform(image)
        pixels = torch.from_numpy(resize.apply_image(image).copy()).permute(2, 0, 1)
        return {"instances": instances_of(self.outputs, {"image": pixels, "height": height, "width": width})}


@pytest.fixture(scope="module")
def of_other_demo(pictures, tmp_path_factory):
    """The inputs on the command line, and the output folder of demo/predict.py."""
    folder = tmp_path_factory.mktemp("other_demo")
    names = ("MODEL.CODETR.CLASS_NAMES", NAMES, "MODEL.CODETR.NUM_CLASSES", len(NAMES))
    write_tiny_run(folder, opts=names)
    arguments = [str(pictures / "inner" / "no_suffix"), str(pictures), "--score-threshold=0.6"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "Predictor", StubPredictor)
        predict.main([*arguments, f"--output={folder / 'out'}", f"--config-file={folder / 'config.yaml'}"])
    return arguments, folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["model.onnx", "model.xml"])
def test_writes_what_the_other_demo_writes(exported, models, of_other_demo, tmp_path, model):
    """Each byte of each drawing and of detections.json, and each frame of a video."""
    arguments, expected_folder = of_other_demo
    exported.main([str(models / model), *arguments, f"--output={tmp_path}"])
    expected = {x.relative_to(expected_folder): x for x in expected_folder.rglob("*.*")}
    found = {x.relative_to(tmp_path): x for x in tmp_path.rglob("*.*")}
    assert expected.keys() == found.keys() and len(found) == 21
    for name in found:
        if name.suffix == ".mp4":
            assert np.array_equal(frames_of(found[name]), frames_of(expected[name]))
        else:
            assert found[name].read_bytes() == expected[name].read_bytes(), name
    entries = json.loads((tmp_path / "detections.json").read_text())
    assert sum(len(x["detections"]) for x in entries) > 100 and len(entries) == 19 + 3


def frames_of(video: Path) -> list[np.ndarray]:
    reader, frames = cv2.VideoCapture(str(video)), []
    while (frame := reader.read()[1]) is not None:
        frames.append(frame)
    assert len(frames) == 3
    return frames


def test_what_the_model_is_given(exported, models):
    """RGB of the size that the package's predictor makes, and that size."""
    detector = exported.Detector(models / "model.onnx")
    given = []
    run = detector._run
    detector._run = lambda x: given.append(x) or run(x)
    image = np.random.default_rng(0).integers(0, 256, (37, 150, 3), dtype=np.uint8)
    detector(image)
    resize = ResizeShortestEdge([MIN_SIZE, MIN_SIZE], MAX_SIZE).get_transform(image)
    expected = resize.apply_image(image)[:, :, ::-1]
    assert np.array_equal(given[0]["images"], expected[None])
    assert given[0]["sizes"].tolist() == [[*expected.shape[:2]]] and given[0]["sizes"].dtype == np.int64


def test_grey_and_unresized(exported, tmp_path):
    outputs = random_outputs()
    kept = outputs["scores"] > 0
    outputs["scores"][np.flatnonzero(kept)[-1]] = 0  # left out though its box has an area
    write_model(tmp_path / "model.onnx", outputs, channels=1, min_size="0")
    detector = exported.Detector(tmp_path / "model.onnx")
    given = []
    run = detector._run
    detector._run = lambda x: given.append(x) or run(x)
    image = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    found = detector(image)
    assert np.array_equal(given[0]["images"][0, :, :, 0], np.asarray(Image.fromarray(image[:, :, ::-1]).convert("L")))
    assert set(found) == {"boxes", "scores", "classes"} and found["boxes"].max() == 50
    inside = kept & (outputs["boxes"][:, :2] < (50, 37)).all(1)
    assert len(found["scores"]) == inside.sum() - inside[np.flatnonzero(kept)[-1]]


def test_font():
    assert load("predict_exported")._font(20).getname() == ("DejaVu Sans", "Book")


def test_sizes(exported):
    random = np.random.default_rng(0)
    for height, width, shortest, longest in random.integers(1, (3000, 3000, 900, 1400), (5000, 4)).tolist():
        new = T.ResizeShortestEdge.get_output_shape(height, width, shortest, longest)
        assert exported.resized(width, height, shortest, longest) == (max(1, new[1]), max(1, new[0]))
    for side in range(1, 3000, 7):  # squares, and the halves of pixels
        for other in (side, 2 * side, 2 * side + 1):
            new = T.ResizeShortestEdge.get_output_shape(side, other, 800, 1333)
            assert exported.resized(other, side, 800, 1333) == (max(1, new[1]), max(1, new[0]))


@pytest.mark.parametrize("side", [1, 7, 28, 112])
def test_masks_are_pasted_as_detectron2_does(exported, side):
    random = np.random.default_rng(side)
    for height, width in ((40, 300), (211, 97), (1, 1), (300, 301)):
        boxes = random_boxes(40, height, width, side).clip(0, (width, height) * 2).astype(np.float32)
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
        masks = random.random((len(boxes), side, side), dtype=np.float32)
        masks[::3] = masks[::3].round()  # many pixels midway between 0 and 1
        masks[1::6] = 1
        expected = paste_masks_in_image(torch.from_numpy(masks), torch.from_numpy(boxes), (height, width)).numpy()
        found = exported.paste_masks(masks, boxes, height, width)
        assert len(boxes) > 10 and expected.any() and np.array_equal(found, expected)


def test_run_length_encoding(exported):
    random = np.random.default_rng(0)
    masks = [np.zeros((5, 7), bool), np.ones((5, 7), bool), random.random((300, 400)) < 0.5]
    masks += [cv2.resize(random.random((4, 4)), (900, 1100)) > 0.5]
    for mask in masks:
        expected = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
        found = exported.encode_mask(mask)
        assert found == {"size": list(mask.shape), "counts": expected["counts"].decode()}


@pytest.mark.parametrize(
    "shape, long_side", [((60, 80), 0), ((60, 80), 640), ((700, 900), 640), ((3, 200), 640), ((1, 1), 0)]
)
@pytest.mark.parametrize("has_masks", [False, True])
def test_draws_as_the_package_does(exported, shape, long_side, has_masks):
    height, width = shape
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    boxes = random_boxes(30, height, width).clip(0, (width, height) * 2).astype(np.float32)
    found = {"boxes": boxes, "scores": random.random(30, dtype=np.float32), "classes": random.integers(0, 5, 30)}
    instances = Instances(shape, pred_boxes=Boxes(torch.from_numpy(boxes)))
    instances.scores, instances.pred_classes = torch.from_numpy(found["scores"]), torch.from_numpy(found["classes"])
    if has_masks:
        masks = np.stack([cv2.resize(random.random((4, 5)), (width, height)) > 0.5 for _ in range(30)])
        found["masks"], instances.pred_masks = masks, torch.from_numpy(masks)
    before = image.copy()
    drawn = exported.draw(image, found, NAMES, long_side)
    assert np.array_equal(image, before)
    expected = draw_predictions(image, instances, NAMES, long_side)
    assert np.array_equal(drawn[:, :, ::-1], expected)
    if min(shape) > 1:
        assert not np.array_equal(drawn, draw_predictions(image, instances[:0], NAMES, long_side)[:, :, ::-1])


def test_nothing_found(exported):
    found = {"boxes": np.empty((0, 4), np.float32), "scores": np.empty(0, np.float32), "classes": np.empty(0, int)}
    image = np.full((50, 70, 3), 9, np.uint8)
    assert np.array_equal(exported.draw(image, found, NAMES), image)
    assert exported.describe(image, found, NAMES) == {"height": 50, "width": 70, "detections": []}


def test_reads_pictures_as_the_package_does(exported, pictures):
    files = [x for x in pictures.iterdir() if x.suffix in (".jpg", ".png", ".tif", ".webp")]
    assert len(files) == 18
    for file in files:
        found, expected = exported.read_image(file), codetr_d2.data.read_image(file, "BGR")
        assert found.dtype == np.uint8 and np.array_equal(found, expected), file


def test_needs_no_other_package(models, pictures, tmp_path):
    """It runs where nothing but NumPy, Pillow, OpenCV and the runtime can be imported, with a font of Pillow's."""
    blocked = ["torch", "torchvision", "detectron2", "codetr_d2", "matplotlib", "pycocotools", "scipy", "tqdm", "onnx"]
    for model, other in (("model.onnx", "openvino"), ("model.xml", "onnxruntime")):
        arguments = [str(models / model), str(pictures / "grey.png"), f"--output={tmp_path / model}"]
        program = (
            f"import sys\nsys.modules.update(dict.fromkeys({[*blocked, other]}))\nsys.path.insert(0, {str(DEMO)!r})\n"
            f"import predict_exported\npredict_exported.FONT = 'missing.ttf'\npredict_exported.main({arguments})"
        )
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert (tmp_path / model / "grey.png").is_file() and "1 of 1 files done" in result.stdout


def error_of(exported, capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as exit:
        exported.main([str(x) for x in arguments])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("model, runtime", [("model.onnx", "onnxruntime"), ("model.xml", "openvino")])
def test_missing_runtime(exported, models, pictures, tmp_path, capsys, monkeypatch, model, runtime):
    monkeypatch.setitem(sys.modules, runtime, None)
    error = error_of(exported, capsys, models / model, pictures, "--output", tmp_path / "out")
    assert f"pip install {runtime}" in error


def test_models_of_another_kind(exported, pictures, tmp_path, capsys):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    onnx.save(make_model([helper.make_node("Abs", ["x"], ["y"])], [x], [y]), tmp_path / "other.onnx")
    openvino.save_model(openvino.convert_model(tmp_path / "other.onnx"), tmp_path / "other.xml")
    for name in ("damaged.onnx", "damaged.xml"):
        (tmp_path / name).write_text("nothing")
    (tmp_path / "model_final.pth").write_bytes(b"x")
    for name, words in {
        "other.onnx": "another kind",
        "other.xml": "another kind",
        "damaged.onnx": "cannot be loaded",
        "damaged.xml": "cannot be loaded",
        "missing.onnx": "tools/export.py",
        "model_final.pth": "tools/export.py",
    }.items():
        error = error_of(exported, capsys, tmp_path / name, pictures, "--output", tmp_path / "out")
        assert words in error and name in error
    assert not (tmp_path / "out").exists()


def test_errors_of_files(exported, models, pictures, tmp_path, capsys):
    model, output = models / "model.onnx", ("--output", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing.png", pictures / "notes.txt"):
        assert f"{path}: there is no picture" in error_of(exported, capsys, model, path, *output)
    error = error_of(exported, capsys, model, pictures / "grey.png", "--output", pictures)
    assert "overwritten" in error and "--output" in error
    assert "0 to 1" in error_of(exported, capsys, model, pictures, *output, "--score-threshold", "30")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    error = error_of(exported, capsys, model, pictures / "grey.png", "--output", tmp_path / "file")
    assert "cannot be written" in error and "--output" in error


def test_damaged_picture_is_named_and_the_others_are_done(exported, models, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    Image.new("RGB", (40, 30)).save(folder / "b.png")
    error = error_of(exported, capsys, models / "model.onnx", folder, "--output", tmp_path / "out")
    assert "a.png" in error
    (entry,) = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert entry["file_name"] == str(folder / "b.png") and (tmp_path / "out" / "b.png").is_file()


def test_ctrl_c_writes_what_is_done(exported, models, pictures, tmp_path, monkeypatch, capsys):
    process = exported.process

    def interrupted(detector, file, *options):
        if file.stem == "grey":
            raise KeyboardInterrupt
        return process(detector, file, *options)

    monkeypatch.setattr(exported, "process", interrupted)
    with pytest.raises(SystemExit) as exit:
        files = [str(pictures / x) for x in ("exif1.png", "grey.png")]
        exported.main([str(models / "model.onnx"), *files, f"--output={tmp_path}"])
    assert exit.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "detections.json").read_text())) == 1


def test_arrays_that_are_no_picture_and_numbers_that_are_none(exported, models, tmp_path):
    detector = exported.Detector(models / "model.onnx")
    for image in (None, np.zeros((4, 5), np.uint8), np.zeros((4, 5, 3)), np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(exported.InputError, match="uint8"):
            detector(image)
    outputs = random_outputs()
    outputs["boxes"][3] = np.nan
    write_model(tmp_path / "model.onnx", outputs)
    with pytest.raises(exported.InputError, match="NaN"):
        exported.Detector(tmp_path / "model.onnx")(np.zeros((4, 5, 3), np.uint8))
