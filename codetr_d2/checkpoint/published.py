"""The published models' parameters <-> ours: a table of names that reads both ways."""

import re

import torch
from torch import Tensor

__all__ = ["codetr_to_published", "is_published", "published_to_codetr"]

# (published, ours). {n}, {m}, {k} stand for a number, {norm} for a number that is one larger in ours, {rest} for
# anything. The first row that fits counts, in both directions.
_TRANSFORMER = "query_head.transformer"
_ROI = "auxiliary_heads.roi"
_ATSS = "auxiliary_heads.atss"
_NAMES = [
    # ResNet: torchvision's names <-> detectron2's
    ("backbone.bn1.{rest}", "backbone.stem.conv1.norm.{rest}"),
    ("backbone.conv1.{rest}", "backbone.stem.conv1.{rest}"),
    *(
        (f"backbone.layer{stage}.{{n}}.{published}.{{rest}}", f"backbone.res{stage + 1}.{{n}}.{ours}.{{rest}}")
        for stage in (1, 2, 3, 4)
        for published, ours in (
            *((f"bn{i}", f"conv{i}.norm") for i in (1, 2, 3)),
            *((f"conv{i}", f"conv{i}") for i in (1, 2, 3)),
            ("downsample.1", "shortcut.norm"),
            ("downsample.0", "shortcut"),
        )
    ),
    ("neck.convs.{n}.conv.{rest}", "neck.convs.{n}.0.{rest}"),
    ("neck.convs.{n}.gn.{rest}", "neck.convs.{n}.1.{rest}"),
    ("neck.extra_convs.{n}.conv.{rest}", "neck.extra_convs.{n}.0.{rest}"),
    ("neck.extra_convs.{n}.gn.{rest}", "neck.extra_convs.{n}.1.{rest}"),
    # Encoder and decoder
    (f"{_TRANSFORMER}.level_embeds", "query_head.encoder.level_embed"),
    (f"{_TRANSFORMER}.encoder.layers.{{n}}.attentions.0.{{rest}}", "query_head.encoder.layers.{n}.self_attn.{rest}"),
    (
        f"{_TRANSFORMER}.decoder.layers.{{n}}.attentions.0.attn.{{rest}}",
        "query_head.decoder.layers.{n}.self_attn.{rest}",
    ),
    (f"{_TRANSFORMER}.decoder.layers.{{n}}.attentions.1.{{rest}}", "query_head.decoder.layers.{n}.cross_attn.{rest}"),
    *(
        row
        for part in ("encoder", "decoder")
        for row in (
            (
                f"{_TRANSFORMER}.{part}.layers.{{n}}.ffns.0.layers.0.0.{{rest}}",
                f"query_head.{part}.layers.{{n}}.ffn.linear1.{{rest}}",
            ),
            (
                f"{_TRANSFORMER}.{part}.layers.{{n}}.ffns.0.layers.1.{{rest}}",
                f"query_head.{part}.layers.{{n}}.ffn.linear2.{{rest}}",
            ),
            (
                f"{_TRANSFORMER}.{part}.layers.{{n}}.norms.{{norm}}.{{rest}}",
                f"query_head.{part}.layers.{{n}}.norm{{norm}}.{{rest}}",
            ),
        )
    ),
    # Proposals and queries
    (f"{_TRANSFORMER}.enc_output.{{rest}}", "query_head.proposals.proj.{rest}"),
    (f"{_TRANSFORMER}.enc_output_norm.{{rest}}", "query_head.proposals.norm.{rest}"),
    (f"{_TRANSFORMER}.pos_trans.{{rest}}", "query_head.box_proj.{rest}"),
    (f"{_TRANSFORMER}.pos_trans_norm.{{rest}}", "query_head.box_norm.{rest}"),
    (f"{_TRANSFORMER}.aux_pos_trans.{{k}}.{{rest}}", "query_head.positive_queries.{k}.box_proj.{rest}"),
    (f"{_TRANSFORMER}.aux_pos_trans_norm.{{k}}.{{rest}}", "query_head.positive_queries.{k}.box_norm.{rest}"),
    (f"{_TRANSFORMER}.pos_feats_trans.{{k}}.{{rest}}", "query_head.positive_queries.{k}.feature_proj.{rest}"),
    (f"{_TRANSFORMER}.pos_feats_norm.{{k}}.{{rest}}", "query_head.positive_queries.{k}.feature_norm.{rest}"),
    ("query_head.query_embedding.weight", "query_head.query_content.weight"),
    ("query_head.cls_branches.{last}.{rest}", "query_head.proposals.class_embed.{rest}"),
    ("query_head.cls_branches.{n}.{rest}", "query_head.decoder.class_embed.{n}.{rest}"),
    ("query_head.reg_branches.{last}.{m}.{rest}", "query_head.proposals.box_embed.{m}.{rest}"),
    ("query_head.reg_branches.{n}.{m}.{rest}", "query_head.decoder.box_embed.{n}.{m}.{rest}"),
    # Auxiliary heads
    ("query_head.downsample.{n}.{rest}", "auxiliary_level.{n}.{rest}"),
    ("rpn_head.rpn_conv.{rest}", f"{_ROI}.proposal_generator.rpn_head.conv.{{rest}}"),
    ("rpn_head.rpn_cls.{rest}", f"{_ROI}.proposal_generator.rpn_head.objectness_logits.{{rest}}"),
    ("rpn_head.rpn_reg.{rest}", f"{_ROI}.proposal_generator.rpn_head.anchor_deltas.{{rest}}"),
    ("roi_head.0.bbox_head.fc_cls.{rest}", f"{_ROI}.roi_heads.box_predictor.cls_score.{{rest}}"),
    ("roi_head.0.bbox_head.fc_reg.{rest}", f"{_ROI}.roi_heads.box_predictor.bbox_pred.{{rest}}"),
    ("roi_head.0.bbox_head.shared_fcs.{norm}.{rest}", f"{_ROI}.roi_heads.box_head.fc{{norm}}.{{rest}}"),
    ("bbox_head.0.cls_convs.{n}.gn.{rest}", f"{_ATSS}.cls_tower.{{n}}.norm.{{rest}}"),
    ("bbox_head.0.cls_convs.{n}.conv.{rest}", f"{_ATSS}.cls_tower.{{n}}.{{rest}}"),
    ("bbox_head.0.reg_convs.{n}.gn.{rest}", f"{_ATSS}.box_tower.{{n}}.norm.{{rest}}"),
    ("bbox_head.0.reg_convs.{n}.conv.{rest}", f"{_ATSS}.box_tower.{{n}}.{{rest}}"),
    ("bbox_head.0.atss_cls.{rest}", f"{_ATSS}.cls_score.{{rest}}"),
    ("bbox_head.0.atss_reg.{rest}", f"{_ATSS}.box_deltas.{{rest}}"),
    ("bbox_head.0.atss_centerness.{rest}", f"{_ATSS}.centerness.{{rest}}"),
    ("bbox_head.0.scales.{n}.scale", f"{_ATSS}.scales.{{n}}"),
]
_HEAD_POSITION = f"{_TRANSFORMER}.head_pos_embed.weight"


def is_published(state_dict: dict[str, Tensor]) -> bool:
    """Whether the names are those of the published models."""
    return any(name.startswith((f"{_TRANSFORMER}.", "query_head.cls_branches.")) for name in state_dict)


def published_to_codetr(state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename a published model's parameters.

    Args:
        state_dict: parameters by published name.

    Returns:
        The parameters by our names, and the published names that have no counterpart with the reason why.
    """
    last = max(
        (int(name.split(".")[2]) for name in state_dict if name.startswith("query_head.cls_branches.")), default=0
    )
    converted, unused = {}, {}
    for name, value in state_dict.items():
        if name == _HEAD_POSITION:  # [heads, 1] -> one [1] for each head
            converted.update({f"query_head.positive_queries.{k}.head_embed": row for k, row in enumerate(value)})
        elif name.endswith(".num_batches_tracked"):
            unused[name] = "a counter of batch norm in training; the statistics are frozen"
        elif (ours := _translate(name, _PUBLISHED_TO_OURS, last, shift=1)) is not None:
            converted[ours] = value
        else:
            unused[name] = "no parameter of this model"
    return converted, unused


def codetr_to_published(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`published_to_codetr`.

    Raises:
        KeyError: a parameter has no published name.
    """
    last = 1 + max(int(name.split(".")[3]) for name in state_dict if name.startswith("query_head.decoder.class_embed."))
    converted, head_positions = {}, {}
    for name, value in state_dict.items():
        if match := re.fullmatch(r"query_head\.positive_queries\.(\d+)\.head_embed", name):
            head_positions[int(match[1])] = value
        elif (published := _translate(name, _OURS_TO_PUBLISHED, last, shift=-1)) is not None:
            converted[published] = value
        else:
            raise KeyError(f"{name} has no published name")
    if head_positions:
        converted[_HEAD_POSITION] = torch.stack([head_positions[k] for k in sorted(head_positions)])
    return converted


def _compile(names: list[tuple[str, str]]) -> list[tuple[re.Pattern, str]]:
    """(template, template) -> (regular expression, template)."""
    rows = []
    for source, target in names:
        pattern = re.escape(source)
        for field in re.findall(r"\{(\w+)\}", source):
            expression = ".+" if field == "rest" else r"\d+"
            pattern = pattern.replace(re.escape(f"{{{field}}}"), f"(?P<{field}>{expression})")
        rows.append((re.compile(pattern), target))
    return rows


_PUBLISHED_TO_OURS = _compile(_NAMES)
_OURS_TO_PUBLISHED = _compile([(ours, published) for published, ours in _NAMES])


def _translate(name: str, rows: list[tuple[re.Pattern, str]], last: int, shift: int) -> str | None:
    """Translate one name; ``last`` is the number of the encoder's branch behind the decoder layers'."""
    for pattern, target in rows:
        if (match := pattern.fullmatch(name)) is None:
            continue
        fields = match.groupdict()
        if int(fields.get("last", last)) != last:
            continue
        if "norm" in fields:
            fields["norm"] = str(int(fields["norm"]) + shift)
        return target.format(**{"last": last, **fields})
    return None
