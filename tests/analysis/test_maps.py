"""Maps of levels and the IoF-IoB curve, against cases worked by hand and scikit-learn."""

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from sklearn.metrics import roc_auc_score

from codetr_d2.analysis.maps import IoFIoBCurve, combine_levels, foreground_mask, levels_of_image
from codetr_d2.modeling.pyramid import Geometry


def test_levels_leave_the_padding_out():
    geometry = Geometry.build([(4, 6), (2, 3)], [8, 16], [(32, 48), (32, 32)], (32, 48))
    values = torch.arange(30)
    whole, narrow = levels_of_image(values, geometry, 0), levels_of_image(values, geometry, 1)
    assert [x.shape for x in whole] == [(4, 6), (2, 3)]
    assert [x.shape for x in narrow] == [(4, 4), (2, 2)]
    assert narrow[0][1].tolist() == [6, 7, 8, 9]
    assert narrow[1].tolist() == [[24, 25], [27, 28]]


def test_levels_count_alike_whatever_their_scale():
    fine, coarse = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[50.0]])
    combined = combine_levels([fine, coarse], (2, 2), (2, 2))
    torch.testing.assert_close(combined, (fine / 4 + 1) / 2)


def test_a_level_is_resized_bilinearly():
    combined = combine_levels([torch.tensor([[0.0, 1.0]])], (1, 4), (1, 4))
    torch.testing.assert_close(combined, torch.tensor([[0.0, 0.25, 0.75, 1.0]]))


def test_the_maximum_is_that_of_the_image_on_its_canvas():
    combined = combine_levels([torch.tensor([[1.0, 9.0], [2.0, 9.0]])], (2, 2), (2, 1))
    torch.testing.assert_close(combined, torch.tensor([[0.5], [1.0]]))


def test_a_level_of_zeros_adds_nothing():
    combined = combine_levels([torch.zeros(1, 1), torch.ones(1, 1)], (2, 2), (2, 2))
    assert combined.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_foreground_is_where_the_centre_of_a_pixel_lies_in_a_box():
    instances = Instances((4, 5), gt_boxes=Boxes(torch.tensor([[0.5, 0.6, 2.4, 2.0], [4.0, 3.0, 9.0, 9.0]])))
    assert foreground_mask(instances).int().tolist() == [
        [0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1],
    ]


def test_foreground_is_that_of_masks_where_there_are_some():
    masks = torch.zeros(2, 2, 3, dtype=torch.bool)
    masks[0, 0, 0] = masks[1, 1, 2] = True
    boxes = Boxes(torch.tensor([[0.0, 0, 3, 2], [0.0, 0, 3, 2]]))
    instances = Instances((2, 3), gt_boxes=boxes, gt_masks=BitMasks(masks))
    assert foreground_mask(instances).int().tolist() == [[1, 0, 0], [0, 0, 1]]


def test_no_object_is_no_foreground():
    assert not foreground_mask(Instances((2, 3), gt_boxes=Boxes(torch.zeros(0, 4)))).any()


def test_a_curve_by_hand():
    curve = IoFIoBCurve(num_thresholds=3)  # 0, 0.5, 1
    curve.add(torch.tensor([[0.0, 0.5], [0.6, 1.0]]), torch.tensor([[False, False], [True, True]]))
    curve.add(torch.tensor([[0.9, 0.2]]), torch.tensor([[False, True]]))
    iob, iof = curve.shares()
    # Of the background 0.5 and 0.9 exceed 0, and 0.9 exceeds 0.5; of the foreground all, and 0.6 and 1.
    assert iob.tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert iof.tolist() == pytest.approx([1, 2 / 3, 0])
    # Trapezoids between (0, 0), (1/3, 2/3), (2/3, 1) and (1, 1).
    assert curve.area() == pytest.approx((1 / 3 + 5 / 6 + 1) / 3)


def test_the_curve_of_several_images_is_that_of_all_their_pixels():
    curve, scores, foregrounds = IoFIoBCurve(), [], []
    for height in (20, 30):
        foreground = torch.rand(height, 25) > 0.7
        # Among them are some of the same score, and narrowly spread ones.
        score = 0.98 + 0.01 * torch.rand(height, 25).round(decimals=1) + 0.01 * foreground * torch.rand(height, 25)
        curve.add(score, foreground)
        scores.append(score.flatten())
        foregrounds.append(foreground.flatten())
    scores, foregrounds = torch.cat(scores), torch.cat(foregrounds)
    # Sorted into the steps between thresholds, as the curve sees them.
    steps = torch.bucketize(scores, curve.thresholds)
    assert curve.area() == pytest.approx(roc_auc_score(foregrounds, steps))
    assert curve.area() == pytest.approx(roc_auc_score(foregrounds, scores), abs=0.005)
    for k in (98500, 99000, 99321):
        above = scores > curve.thresholds[k]
        assert curve.shares()[0][k].item() == pytest.approx((above & ~foregrounds).sum().item() / (~foregrounds).sum())
        assert curve.shares()[1][k].item() == pytest.approx((above & foregrounds).sum().item() / foregrounds.sum())


def test_the_points_to_draw_are_some_of_the_curve():
    curve = IoFIoBCurve()
    foreground = torch.rand(50, 50) > 0.5
    curve.add((torch.rand(50, 50) + 0.5 * foreground) / 1.5, foreground)
    thresholds, iob, iof = curve.points(step=0.02)
    assert 80 < len(thresholds) <= 101
    # The curve falls by steps of one pixel at a time.
    assert (iob + iof).diff().abs().max() < 0.04
    index = torch.searchsorted(curve.thresholds, thresholds)
    assert torch.equal(curve.shares()[0][index], iob)
    assert torch.equal(curve.shares()[1][index], iof)
