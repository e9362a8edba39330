"""Denoising queries from recorded random draws equal those of the published implementation."""

import torch
from detectron2.structures import Boxes, Instances

from codetr_d2.modeling.queries import ContrastiveDenoising, DenoisingNoise
from codetr_d2.modeling.structures import QueryGroup, Targets
from codetr_d2.modeling.transformer.decoder import attention_blocks
from tests.reference.recordings import draw_parameter, parameter_shapes, subsample


def test_queries(denoising):
    recorded, meta, folder = denoising
    sizes = meta["valid_sizes_hw"]
    instances = []
    for (height, width), gt in zip(sizes, meta["gt"]):
        boxes = Boxes(torch.tensor(gt["boxes_xyxy_pixels"]).view(-1, 4))
        instances.append(Instances((height, width), gt_boxes=boxes, gt_classes=torch.tensor(gt["labels"])))
    sizes_xyxy = torch.tensor([[w, h, w, h] for h, w in sizes], dtype=torch.float32)
    targets = Targets(instances, sizes_xyxy)

    name = "query_head.label_embedding.weight"
    shape = parameter_shapes(folder, meta["official_config"])[name]
    module = ContrastiveDenoising(shape[1], shape[0], 100, meta["label_noise"], meta["box_noise"])
    module.label_embed.weight.data = draw_parameter(name, shape, meta["weight_salt"])

    counts, copies = targets.num_targets, meta["groups"]
    draws = recorded["label_prob_draw"]
    new_labels = torch.zeros(len(draws), dtype=torch.int64)
    new_labels[draws < meta["label_noise"] / 2] = recorded["new_label_draw"]

    def to_slots(values):
        """[2 * copies * T, ...], the objects of all images one after the other -> [B, copies, 2, G, ...]."""
        slots = values.new_zeros((len(counts), copies, 2, max(counts), *values.shape[1:]))
        rows = values.view(copies, 2, sum(counts), *values.shape[1:]).split(counts, dim=2)
        for i, row in enumerate(rows):
            slots[i, :, :, : counts[i]] = row
        return slots

    signs = recorded["sign_draw01"].float() * 2 - 1
    noise = DenoisingNoise(*map(to_slots, (draws, new_labels, signs, recorded["part_draw01"])))
    group = module(targets, noise)

    assert group.num_queries == meta["dn_slots"]
    content = subsample(group.content, "[:, :, ::8]")
    torch.testing.assert_close(content, recorded["content"], rtol=0, atol=1e-6)
    torch.testing.assert_close(group.reference_boxes, recorded["box_logits"].sigmoid(), rtol=0, atol=1e-6)

    # Ours come behind the matching queries, the published ones before them.
    num_queries, slots = meta["num_queries"], meta["dn_slots"]
    matching = QueryGroup("", torch.zeros(2, num_queries, 1), torch.zeros(2, num_queries, 4))
    blocks = attention_blocks([matching, group])
    allowed = torch.zeros(num_queries + slots, num_queries + slots, dtype=torch.bool)
    for block in blocks:
        allowed[block.queries, block.keys] = True if block.mask is None else block.mask[0, 0]
    order = torch.cat((torch.arange(num_queries, num_queries + slots), torch.arange(num_queries)))
    assert torch.equal(~allowed[order][:, order], recorded["attn_mask"].bool())
