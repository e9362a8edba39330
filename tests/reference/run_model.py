"""Runs our model as ``CoDETR.forward`` does and keeps what the recordings hold."""

from types import SimpleNamespace

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

from codetr_d2.modeling.postprocess import detections_from_queries
from codetr_d2.modeling.query_heads import CoDINOHead


def detections(prefix: str, results: list[Instances]) -> dict[str, Tensor]:
    values = {}
    for i, x in enumerate(results):
        values[f"{prefix}_boxes_{i}"] = x.pred_boxes.tensor
        values[f"{prefix}_scores_{i}"] = x.scores
        values[f"{prefix}_labels_{i}"] = x.pred_classes
    return values


@torch.no_grad()
def run_inference(model: torch.nn.Module, batch: list[dict], recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full arrays by the names of the recording (its README, section 3); detections in network-input pixels."""
    model.eval()
    head = model.query_head
    images = model.preprocess(batch)
    if model.neck is None:  # the backbone has its pyramid in it
        features = [model.backbone.net(images.tensor)]
    else:
        features = list(model.backbone(images.tensor).values())
    pyramid = model.features(images)
    values = {f"backbone_{i}": x for i, x in enumerate(features)}
    values |= {f"neck_{i}": x for i, x in enumerate(pyramid.maps())}

    memory = head.encode(pyramid)
    proposals = head.proposals(memory)
    index = settle_ties(head.best_proposals(proposals), recorded["topk_indices"], head.proposal_scores(proposals))
    head.best_proposals = lambda proposals: index
    queries = head.matching_queries(head.proposals.box_logits(proposals, index).sigmoid())
    output = head.predict(memory)
    values |= {
        "memory": memory.tokens,
        "enc_proposal_logit": proposals.prior_logits,
        "enc_output_memory": proposals.embeddings,
        "enc_cls": proposals.logits,
        "enc_box_unact": head.proposals.box_logits(proposals),
        "topk_indices": index,
        "enc_topk_scores": head.proposal_scores(proposals).gather(1, index),
        "init_reference": queries.reference_boxes,
        "query_pos_in": queries.position,
        "dec_states": output.states,
        "dec_references": output.references if isinstance(head, CoDINOHead) else output.boxes,
        "cls_logits": output.logits,
        "boxes": output.boxes,
    }
    found = detections_from_queries(
        output.logits[-1], output.boxes[-1], memory.geometry.image_sizes, head.max_detections
    )
    values |= detections("det_nonms", found)
    values |= detections("det", head.inference(memory))
    # The model as a whole gives what its parts give, but for what lies in the padding of a canvas.
    for x, whole, part in zip(batch, model(batch), head.inference(memory)):
        part.pred_boxes.clip(x["image"].shape[-2:])
        part = part[part.pred_boxes.nonempty()]
        assert torch.equal(whole["instances"].scores, part.scores)
        assert torch.equal(whole["instances"].pred_boxes.tensor, part.pred_boxes.tensor)

    pyramid = model.auxiliary_pyramid(memory)
    maps = pyramid.maps()
    values["aux_last"] = maps[-1]
    if "roi" in model.auxiliary_heads:
        values |= run_roi_head(model.auxiliary_heads["roi"], pyramid, recorded)
    if "atss" in model.auxiliary_heads:
        atss = model.auxiliary_heads["atss"]
        for i, ((logits, deltas, centerness), (height, width)) in enumerate(
            zip(atss.predict(maps), pyramid.geometry.shapes)
        ):
            for name, x in (("cls", logits), ("reg", deltas), ("ctr", centerness.unsqueeze(-1))):
                values[f"atss_{name}_{i}"] = x.transpose(1, 2).unflatten(2, (height, width))
        values |= detections("atss_det", atss.inference(pyramid))
    return values


def settle_ties(index: Tensor, recorded: Tensor, scores: Tensor) -> Tensor:
    """The recorded order of the chosen tokens, where it differs from ours among equal scores only.

    Scores lie closer together than float32 computes them: 1e-5 is the recordings' own noise of a logit.
    """
    if torch.allclose(scores.gather(1, index), scores.gather(1, recorded), rtol=0, atol=1e-5):
        return recorded
    return index


def run_roi_head(head, pyramid, recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    images, features = head._inputs(pyramid)
    logits, deltas = head.proposal_generator.rpn_head(list(features.values()))
    values = {f"rpn_cls_{i}": x for i, x in enumerate(logits)} | {f"rpn_reg_{i}": x for i, x in enumerate(deltas)}
    proposals, _ = head.proposal_generator(images, features)
    for i, x in enumerate(proposals):
        values[f"proposals_{i}"] = torch.cat(
            (x.proposal_boxes.tensor, x.objectness_logits.sigmoid().unsqueeze(1)), dim=1
        )
    # The box head on the recorded regions.
    rois = recorded["roi_in"]
    heads = head.roi_heads
    boxes = [Boxes(rois[rois[:, 0] == i, 1:]) for i in range(len(images))]
    pooled = heads.box_pooler([features[name] for name in heads.box_in_features], boxes)
    values["roi_cls"], values["roi_reg"] = heads.box_predictor(heads.box_head(pooled))
    values["roi_feat_mean"] = pooled.mean((2, 3))
    values["roi_feat_first"] = pooled[:2]
    return values | detections("roi_det", head.inference(pyramid))


def run_training(model: torch.nn.Module, batch: list[dict]) -> SimpleNamespace:
    """Losses, gradients, matchings and positives of one training step."""
    model.train()
    kept = SimpleNamespace(model=model, groups={}, samples={}, matches=None, rpn=None)
    matcher = model.query_head.criterion.matcher
    solve = matcher.match

    def match(costs, num_targets):
        kept.matches = solve(costs, num_targets)
        return kept.matches

    matcher.match = match
    for queries in model.query_head.positive_queries.values():
        queries.register_forward_hook(lambda _, args, group: kept.groups.update({group.name: group}))
    for name, head in model.auxiliary_heads.items():
        head.register_forward_hook(lambda _, args, result, name=name: kept.samples.update({name: result[1]}))
        if name == "roi":
            generator = head.proposal_generator
            label = generator.label_and_sample_anchors

            def label_and_sample_anchors(anchors, targets, label=label):
                kept.rpn = (anchors, *label(anchors, targets))
                return kept.rpn[1:]

            generator.label_and_sample_anchors = label_and_sample_anchors
            generator.register_forward_hook(lambda _, args, result: setattr(kept, "proposals", result[0]))
    with EventStorage(0):
        kept.losses = model(batch)
    sum(kept.losses.values()).backward()
    return kept
