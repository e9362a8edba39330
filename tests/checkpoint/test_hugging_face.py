"""hf:// addresses, without a network."""

import huggingface_hub
import pytest
import torch
from detectron2.utils.file_io import PathManager
from torch import nn

from codetr_d2.checkpoint.checkpointer import CoDETRCheckpointer
from codetr_d2.errors import InputError

ADDRESS = "hf://owner/repository/folder/model.pth"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository with one file; lists what has been asked for."""
    asked = []
    model = nn.Linear(2, 2)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")

    def download(repository, file, force_download=False):
        asked.append((repository, file))
        return str(tmp_path / "model.pth")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return model, asked


def test_weights_are_loaded_by_address(hub):
    expected, asked = hub
    model = nn.Linear(2, 2)
    CoDETRCheckpointer(model).load(ADDRESS)
    assert torch.equal(model.weight, expected.weight)
    assert set(asked) == {("owner/repository", "folder/model.pth")}


def test_other_files_are_read_and_never_written(hub, tmp_path):
    with PathManager.open(ADDRESS, "rb") as file:
        assert file.read() == (tmp_path / "model.pth").read_bytes()
    with pytest.raises(InputError, match="nothing can be written"):
        PathManager.open(ADDRESS, "w")


@pytest.mark.parametrize("address", ["hf://", "hf://owner", "hf://owner/repository", "hf://owner/repository/"])
def test_half_an_address(address, hub):
    with pytest.raises(InputError, match="write it like hf://OWNER/REPOSITORY/FILE"):
        CoDETRCheckpointer(nn.Linear(2, 2)).load(address)


def test_without_a_network(monkeypatch, tmp_path):
    """huggingface_hub's own error, of a machine that is told that it has none."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=f"^{ADDRESS}: cannot be fetched .*check the address and the network") as error:
        CoDETRCheckpointer(nn.Linear(2, 2)).load(ADDRESS)
    assert "\n" not in str(error.value)
