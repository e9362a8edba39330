"""Two processes with half of the images each compute the gradient of one process with all of them."""

import pytest
import torch
from detectron2.engine import create_ddp_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from codetr_d2.engine import run_processes
from tests.small_model import build

HEADS = ("atss", "roi", "paa", "retinanet", "fcos", "gfl")
# Nothing is left to chance: all anchors and proposals are taken, and empty slots are not filled up with negatives.
OPTIONS = ["MODEL.RPN.BATCH_SIZE_PER_IMAGE", 100000, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 100000]
OPTIONS += ["MODEL.CODETR.POSITIVE_QUERIES.PADDING", "mask", "MODEL.CODETR.POSITIVE_QUERIES.MAX_PER_HEAD", 1000]


def batch(num_objects):
    """Images of one size, as padding is for the largest of a process."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for n in num_objects:
        corner = torch.rand(n, 2, generator=generator) * 60
        boxes = Boxes(torch.cat((corner, corner + 10 + torch.rand(n, 2, generator=generator) * 40), dim=1))
        classes = torch.randint(10, (n,), generator=generator)
        image = torch.rand(3, 112, 128, generator=generator) * 255
        samples.append({"image": image, "instances": Instances((112, 128), gt_boxes=boxes, gt_classes=classes)})
    return samples


def gradients(model, samples):
    """Of the second of two steps: DDP finds out in it whether a parameter had none in the first."""
    for _ in range(2):
        model.zero_grad()
        with EventStorage():
            losses = model(samples)
        sum(losses.values()).backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def save_gradients(num_objects, path):
    torch.set_num_threads(1)
    share = len(num_objects) // comm.get_world_size()
    first = comm.get_rank() * share
    model = create_ddp_model(build(*OPTIONS, aux_heads=HEADS).train(), broadcast_buffers=False, device_ids=None)
    found = gradients(model, batch(num_objects)[first : first + share])
    if comm.is_main_process():
        torch.save(found, path)


@pytest.fixture
def one_thread():
    """As the processes have: sums of several threads round differently, and proposals that all but tie may change."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("num_objects", [(3, 1, 2, 4), (5, 2, 0, 0)])
def test_with_all_heads(one_thread, num_objects, tmp_path):
    run_processes(save_gradients, 2, device="cpu", args=(num_objects, str(tmp_path / "two.pth")))
    two = torch.load(tmp_path / "two.pth", weights_only=True)
    one = gradients(build(*OPTIONS, aux_heads=HEADS).train(), batch(num_objects))
    assert two.keys() == one.keys()
    for name, gradient in one.items():
        scale = gradient.abs().max()
        assert (two[name] - gradient).abs().max() <= 1e-4 * scale + 1e-7, name


@pytest.mark.slow
def test_without_any_object(tmp_path):
    """No parameter waits for a gradient. What losses are divided by is at least 1 in each process."""
    run_processes(save_gradients, 2, device="cpu", args=((0, 0), str(tmp_path / "two.pth")))
    assert all(x is not None and x.isfinite().all() for x in torch.load(tmp_path / "two.pth").values())
