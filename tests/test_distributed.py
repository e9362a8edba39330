"""Two processes that share a batch train as one process that has all of it."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import multiprocessing

from codetr_d2.config import add_codetr_config
from codetr_d2.distributed import reduce_mean
from codetr_d2.modeling.auxiliary import AUX_HEAD_REGISTRY, build_auxiliary_head
from codetr_d2.modeling.pyramid import FeaturePyramid, Geometry

CONFIG = Path(__file__).parents[1] / "configs" / "_base_" / "co_deformable_detr.yaml"
STRIDES = [8, 16, 32, 64, 128]
SIZE = (160, 192)
# Many objects in one image and few in the other: the processes' own counts of positives differ.
OBJECTS = [
    [[10, 10, 60, 70], [50, 20, 120, 90], [5, 30, 40, 90], [64, 2, 110, 50], [20, 40, 100, 80]],
    [[30, 20, 80, 75]],
]


def gradients(images):
    """The gradients of all auxiliary heads' losses on some of the two images, as one vector."""
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.merge_from_file(str(CONFIG))
    cfg.MODEL.CODETR.NUM_CLASSES = 3
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    # Nothing is left out of the samples, so nothing is random.
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 1_000_000
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 100
    torch.manual_seed(0)
    shapes = [(math.ceil(SIZE[0] / s), math.ceil(SIZE[1] / s)) for s in STRIDES]
    tokens = torch.randn(2, sum(h * w for h, w in shapes), 16)[images]
    pyramid = FeaturePyramid(tokens, Geometry.build(shapes, STRIDES, [SIZE] * len(images), SIZE))
    targets = []
    for i in images:
        boxes = torch.tensor(OBJECTS[i], dtype=torch.float32)
        targets.append(Instances(SIZE, gt_boxes=Boxes(boxes), gt_classes=torch.arange(len(boxes)) % 3))
    levels = [ShapeSpec(channels=16, stride=stride) for stride in STRIDES]
    vector = []
    for name in sorted(name for name, _ in AUX_HEAD_REGISTRY):
        torch.manual_seed(1)
        head = build_auxiliary_head(name, cfg, levels)
        with EventStorage():
            losses, _ = head(pyramid, targets)
        grads = torch.autograd.grad(sum(losses.values()), list(head.parameters()))
        vector += [grad.flatten() for grad in grads]
    return torch.cat(vector)


def run_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mean = reduce_mean(torch.tensor([1.0 + rank, 4.0]))
    vector = gradients([rank])
    dist.all_reduce(vector)
    if rank == 0:
        torch.save({"mean": mean, "gradients": vector / 2}, f"{folder}/result.pth")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    multiprocessing.spawn(run_process, (str(tmp_path),), nprocs=2)
    result = torch.load(tmp_path / "result.pth", weights_only=True)
    assert result["mean"].tolist() == [1.5, 4.0]
    torch.testing.assert_close(result["gradients"], gradients([0, 1]), rtol=1e-4, atol=1e-6)


def test_one_process():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    assert reduce_mean(x) is x


def test_the_least_sum(other_process):
    x = torch.tensor([0.25, 2.0])
    assert reduce_mean(x, min_sum=1).tolist() == [1.0, 2.0]
    other_process(1)
    assert reduce_mean(x, min_sum=1).tolist() == [0.5, 2.0]  # of the sum over both, not of the mean


def test_the_mean_of_two_processes(other_process):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    other_process(3)
    mean = reduce_mean(x)
    assert mean.tolist() == [2.0, 4.0] and not mean.requires_grad
    assert x.tolist() == [1.0, 2.0]
