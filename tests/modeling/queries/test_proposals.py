import torch

from codetr_d2.modeling.queries import TwoStageProposals, prior_boxes


def test_prior_boxes(memory):
    boxes, valid = prior_boxes(memory.geometry)
    # Second image: level 0 has 4 x 4 valid cells, level 1 has 2 x 2.
    torch.testing.assert_close(boxes[1, 6 * 2 + 1], torch.tensor([1.5 / 4, 2.5 / 4, 0.05, 0.05]))
    torch.testing.assert_close(boxes[1, 24 + 3 * 1 + 0], torch.tensor([0.25, 0.75, 0.1, 0.1]))
    assert torch.equal(valid, ~memory.geometry.padding_mask)


def test_padding_holds_no_proposal(memory):
    module = TwoStageProposals(32, 5)
    proposals = module(memory)
    box_logits = module.box_logits(proposals)
    padding = memory.geometry.padding_mask
    assert torch.isinf(box_logits[padding]).all() and torch.isfinite(box_logits[~padding]).all()
    # A fresh model proposes the prior boxes.
    boxes, _ = prior_boxes(memory.geometry)
    torch.testing.assert_close(box_logits[~padding].sigmoid(), boxes[~padding])
    index = torch.tensor([[3, 0, 7], [1, 1, 2]])
    torch.testing.assert_close(module.box_logits(proposals, index), box_logits[torch.arange(2)[:, None], index])
    # What stands in the padding does not matter.
    again = TwoStageProposals(32, 5)
    before = again(memory).logits
    memory.tokens[padding] = 7.0
    torch.testing.assert_close(again(memory).logits, before)
