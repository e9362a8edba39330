"""Configs and weights by name."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from codetr_d2 import model_zoo
from codetr_d2.config.config_file import load_config
from codetr_d2.errors import InputError

ROOT = Path(__file__).parents[2]
NAMES = sorted(x.relative_to(ROOT / "configs").as_posix() for x in (ROOT / "configs").glob("[!_]*/*.yaml"))
TINY = "quick_start/co_deformable_detr_efficientnet_lite0_digits.yaml"


@pytest.mark.parametrize("name", {Path(x).parent: x for x in NAMES}.values())  # one of each folder
def test_a_config_by_its_name(name):
    assert model_zoo.get_config(name) == load_config(str(ROOT / "configs" / name))


def test_a_name_that_is_none():
    with pytest.raises(
        InputError, match=r"co_dino_r50\.yaml: no such config.*co_dino/co_dino_5scale_r50_1x_coco\.yaml"
    ):
        model_zoo.get_config_file("co_dino/co_dino_r50.yaml")
    with pytest.raises(InputError, match="no such config"):
        model_zoo.get_config("_base_/nothing.yaml")


def test_published_weights_have_addresses_or_say_where_they_are():
    name = "co_dino_vit/co_dino_5scale_vit_large_coco.yaml"
    address = "hf://zongzhuofan/co-detr-vit-large-coco/pytorch_model.pth"
    assert model_zoo.get_checkpoint_url(name) == model_zoo.get_config(name, trained=True).MODEL.WEIGHTS == address
    assert model_zoo.get_config(name).MODEL.WEIGHTS == ""
    with pytest.raises(InputError, match="MODEL_ZOO.md says where"):
        model_zoo.get_config("co_dino/co_dino_5scale_r50_1x_coco.yaml", trained=True)


def test_addresses_in_the_documentation_are_those_of_the_code():
    text = (ROOT / "MODEL_ZOO.md").read_text()
    documented = dict(re.findall(r"--config-file (\S+\.yaml).*\n +MODEL\.WEIGHTS (hf://\S+)", text))
    expected = {}
    for name in NAMES:
        try:
            expected[name] = model_zoo.get_checkpoint_url(name)
        except InputError:
            continue
    assert len(expected) == 4 and expected == documented


@pytest.mark.slow
def test_a_model_by_its_name(tmp_path, monkeypatch):
    cfg = load_config(str(ROOT / "configs" / TINY))
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    torch.manual_seed(0)
    expected = build_model(cfg).state_dict()
    torch.save({"model": expected}, cfg.MODEL.WEIGHTS)
    monkeypatch.setattr(model_zoo.model_zoo, "load_config", lambda file: cfg.clone())
    model = model_zoo.get(TINY, device="cpu")
    assert model.training and all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())


@pytest.mark.slow
def test_a_wheel_holds_the_configs(tmp_path, monkeypatch):
    """As setuptools builds it; the C++ library is left out, as it takes minutes."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "codetr_d2", "configs"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path)]
    monkeypatch.setenv("CODETR_D2_NO_CPP", "1")
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    folder = "codetr_d2/model_zoo/configs/"
    with zipfile.ZipFile(wheel) as archive:
        found = {x.removeprefix(folder) for x in archive.namelist() if x.startswith(folder)}
    assert {*NAMES, "_base_/co_dino.yaml"} <= found
