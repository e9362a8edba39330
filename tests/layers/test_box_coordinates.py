import math

import torch
from torchvision.ops import generalized_box_iou

from codetr_d2.layers import inverse_sigmoid, paired_giou, pairwise_giou, sine_embedding


def random_boxes(*shape: int) -> torch.Tensor:
    corner = torch.rand(*shape, 2) * 50
    return torch.cat((corner, corner + 1 + torch.rand(*shape, 2) * 50), dim=-1)


def test_pairwise_giou_against_torchvision():
    boxes1, boxes2 = random_boxes(3, 5), random_boxes(3, 4)
    giou = pairwise_giou(boxes1, boxes2)
    for i in range(3):
        torch.testing.assert_close(giou[i], generalized_box_iou(boxes1[i], boxes2[i]))
    torch.testing.assert_close(paired_giou(boxes1[0, :4], boxes2[0]), giou[0].diagonal()[:4])


def test_giou_of_boxes_without_area_is_finite():
    point = torch.full((1, 4), 3.0, requires_grad=True)
    giou = paired_giou(point, torch.full((1, 4), 3.0))
    giou.sum().backward()
    assert torch.isfinite(giou).all() and torch.isfinite(point.grad).all()


def test_inverse_sigmoid():
    x = torch.rand(100, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(x, 1e-5).sigmoid(), x, rtol=0, atol=1e-5)
    ends = inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]), 1e-3)
    torch.testing.assert_close(ends, torch.tensor([-1.0, -1.0, 1.0, 1.0]) * math.log(1e3))


def test_sine_embedding_against_a_loop():
    coordinates = torch.rand(2, 3)
    embedding = sine_embedding(coordinates, 8)
    assert embedding.shape == (2, 24)
    for i in range(2):
        for n in range(3):
            for k in range(8):
                angle = coordinates[i, n].item() * 2 * math.pi / 10000 ** (2 * (k // 2) / 8)
                expected = math.sin(angle) if k % 2 == 0 else math.cos(angle)
                assert abs(embedding[i, n * 8 + k].item() - expected) < 1e-5
