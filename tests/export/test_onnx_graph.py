"""The ONNX graph against the model itself; tests/end_to_end/test_export.py has the other kinds of models."""

import pytest
import torch

from codetr_d2.errors import InputError
from codetr_d2.export.onnx_graph import build_onnx_model
from tests.exported_model import CO_DINO, EVA02, ONE_LAYER, RESNET, export, lively
from tests.small_model import build


@pytest.mark.slow
@torch.no_grad()
def test_raw_predictions(tmp_path):
    model = lively(build(*CO_DINO, *RESNET, *ONE_LAYER))
    exported = export(model, tmp_path / "model.onnx", postprocess="none")
    image = torch.randint(256, (3, 70, 90))
    found = exported.session(exported.pack([image]))
    expected = model.raw_predictions(((image - model.pixel_mean) / model.pixel_std)[None])
    for name, value in zip(("logits", "boxes"), expected):
        torch.testing.assert_close(value, torch.from_numpy(found[name]), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="has no detections: export it without --postprocess none"):
        exported([{"image": image}])


def test_eva02_of_any_size_is_refused():
    model = build(*EVA02, aux_heads=()).eval()
    with pytest.raises(InputError, match=r"one size of images alone: set MODEL\.CODETR\.CANVAS_SIZE"):
        build_onnx_model(model, False)
