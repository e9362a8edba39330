"""The published models' parameters <-> ours: a table of names that reads both ways."""

import re
from collections import defaultdict

import torch
from torch import Tensor

from ..modeling.backbones.eva02 import rotary_tables

__all__ = [
    "COUNTER",
    "FOREIGN",
    "ROTARY",
    "codetr_to_published",
    "computed_tensors",
    "describe",
    "is_published",
    "published_to_codetr",
]

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
    # Swin: the same names
    ("backbone.patch_embed.{rest}", "backbone.patch_embed.{rest}"),
    ("backbone.layers.{rest}", "backbone.layers.{rest}"),
    ("backbone.norm{n}.{rest}", "backbone.norm{n}.{rest}"),
    # EVA-02 with its feature pyramid; see also _VIT_NAMES
    ("backbone.blocks.{rest}", "backbone.net.blocks.{rest}"),
    ("backbone.pos_embed", "backbone.net.pos_embed"),
    ("backbone.out_norm.{rest}", "backbone.net.out_norm.{rest}"),
    ("neck.p{n}.{rest}", "backbone.p{n}.{rest}"),
    ("neck.convs.{n}.conv.{rest}", "neck.convs.{n}.0.{rest}"),
    ("neck.convs.{n}.gn.{rest}", "neck.convs.{n}.1.{rest}"),
    ("neck.extra_convs.{n}.conv.{rest}", "neck.extra_convs.{n}.0.{rest}"),
    ("neck.extra_convs.{n}.gn.{rest}", "neck.extra_convs.{n}.1.{rest}"),
    # Encoder and decoder; see also _DINO_NAMES
    (f"{_TRANSFORMER}.level_embeds", "query_head.encoder.level_embed"),
    (f"{_TRANSFORMER}.encoder.layers.{{n}}.attentions.0.{{rest}}", "query_head.encoder.layers.{n}.self_attn.{rest}"),
    (
        f"{_TRANSFORMER}.decoder.layers.{{n}}.attentions.0.attn.{{rest}}",
        "query_head.decoder.layers.{n}.self_attn.{rest}",
    ),
    (f"{_TRANSFORMER}.decoder.layers.{{n}}.attentions.1.{{rest}}", "query_head.decoder.layers.{n}.cross_attn.{rest}"),
    (f"{_TRANSFORMER}.decoder.ref_point_head.{{n}}.{{rest}}", "query_head.decoder.position_head.{n}.{rest}"),
    (f"{_TRANSFORMER}.decoder.norm.{{rest}}", "query_head.decoder.norm.{rest}"),
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
    ("query_head.label_embedding.weight", "query_head.denoising.label_embed.weight"),
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
    ("roi_head.0.bbox_head.shared_convs.{norm}.gn.{rest}", f"{_ROI}.roi_heads.box_head.conv{{norm}}.norm.{{rest}}"),
    ("roi_head.0.bbox_head.shared_convs.{norm}.conv.{rest}", f"{_ROI}.roi_heads.box_head.conv{{norm}}.{{rest}}"),
    ("roi_head.0.mask_head.convs.{norm}.conv.{rest}", f"{_ROI}.roi_heads.mask_head.mask_fcn{{norm}}.{{rest}}"),
    ("roi_head.0.mask_head.upsample.{rest}", f"{_ROI}.roi_heads.mask_head.deconv.{{rest}}"),
    ("roi_head.0.mask_head.conv_logits.{rest}", f"{_ROI}.roi_heads.mask_head.predictor.{{rest}}"),
    ("bbox_head.0.cls_convs.{n}.gn.{rest}", f"{_ATSS}.cls_tower.{{n}}.norm.{{rest}}"),
    ("bbox_head.0.cls_convs.{n}.conv.{rest}", f"{_ATSS}.cls_tower.{{n}}.{{rest}}"),
    ("bbox_head.0.reg_convs.{n}.gn.{rest}", f"{_ATSS}.box_tower.{{n}}.norm.{{rest}}"),
    ("bbox_head.0.reg_convs.{n}.conv.{rest}", f"{_ATSS}.box_tower.{{n}}.{{rest}}"),
    ("bbox_head.0.atss_cls.{rest}", f"{_ATSS}.cls_score.{{rest}}"),
    ("bbox_head.0.atss_reg.{rest}", f"{_ATSS}.box_deltas.{{rest}}"),
    ("bbox_head.0.atss_centerness.{rest}", f"{_ATSS}.centerness.{{rest}}"),
    ("bbox_head.0.scales.{n}.scale", f"{_ATSS}.scales.{{n}}"),
    # Instance masks of Co-DINO-Inst
    ("mask_iou_head.{rest}", "mask_head.iou_head.{rest}"),
    ("mask_head.{rest}", "mask_head.{rest}"),
]
# Names that stand for something else in one family of models only; they come before the others.
_VIT_NAMES = [("backbone.patch_embed.{rest}", "backbone.net.patch_embed.{rest}")]
_DINO_NAMES = [(f"{_TRANSFORMER}.query_embed.weight", "query_head.query_content.weight")]
_HEAD_POSITION = f"{_TRANSFORMER}.head_pos_embed.weight"
_HEAD_DIM = 64  # channels of an attention head of the published ViTs
_HEADS = ("roi", "atss")  # the auxiliary heads, in the order of the published positive queries

COUNTER = "a counter of batch norm in training; the statistics are frozen"
ROTARY = "a table of rotary positions, which are computed from the config"
_AVERAGED = "the copy that an averaging hook keeps in training; the plain names hold the averaged weights"
FOREIGN = "no parameter of this model"


def is_published(state_dict: dict[str, Tensor]) -> bool:
    """Whether the names are those of the published models."""
    return any(name.startswith((f"{_TRANSFORMER}.", "query_head.cls_branches.")) for name in state_dict)


def published_to_codetr(state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename a published model's parameters, or those of its backbone.

    Args:
        state_dict: parameters by published name.

    Returns:
        The parameters by our names, and the published names that have no counterpart with the reason why.
    """
    last = max(
        (int(name.split(".")[2]) for name in state_dict if name.startswith("query_head.cls_branches.")), default=0
    )
    is_vit = any(name.startswith("backbone.blocks.") for name in state_dict)
    is_dino = f"{_TRANSFORMER}.query_embed.weight" in state_dict
    rows = _table(is_vit, is_dino)[0]
    converted, unused = {}, {}
    for name, value in state_dict.items():
        if name == _HEAD_POSITION:  # [heads, 1] -> one [1] for each head
            converted.update(
                {f"query_head.positive_queries.{_HEADS[k]}.head_embed": row for k, row in enumerate(value)}
            )
        elif name.endswith(".num_batches_tracked"):
            unused[name] = COUNTER
        elif name.endswith((".freqs_cos", ".freqs_sin")):
            unused[name] = ROTARY
        elif name.startswith("ema_"):
            unused[name] = _AVERAGED
        elif (ours := _translate(name, rows, last, shift=1)) is not None:
            ours = re.sub(r"(?<=^query_head\.positive_queries\.)\d+", lambda match: _HEADS[int(match[0])], ours)
            converted[ours] = value
        else:
            unused[name] = FOREIGN
    # Auxiliary heads stand in the order of their positive queries, as in a state dict of ours.
    return dict(sorted(converted.items(), key=lambda item: item[0].startswith(f"{_ATSS}."))), unused


def codetr_to_published(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`published_to_codetr`.

    Args:
        state_dict: parameters by our names, those of the auxiliary heads in the order of the positive queries.

    Raises:
        KeyError: a parameter has no published name.
    """
    last = 1 + max(
        (int(name.split(".")[3]) for name in state_dict if name.startswith("query_head.decoder.class_embed.")),
        default=-1,
    )
    is_vit = any(name.startswith("backbone.net.") for name in state_dict)
    is_dino = any(name.startswith("query_head.decoder.norm.") for name in state_dict)
    rows = _table(is_vit, is_dino)[1]
    published_heads = [
        head for head in _HEADS if any(name.startswith(f"auxiliary_heads.{head}.") for name in state_dict)
    ]
    converted, head_positions = {}, {}
    for name, value in state_dict.items():
        source = name
        if match := re.fullmatch(r"query_head\.positive_queries\.(\w+)\.(.+)", name):
            if match[1] not in published_heads:
                raise KeyError(f"{name} has no published name")
            index = published_heads.index(match[1])
            if match[2] == "head_embed":
                head_positions[index] = value
                continue
            source = f"query_head.positive_queries.{index}.{match[2]}"
        if (published := _translate(source, rows, last, shift=-1)) is None:
            raise KeyError(f"{name} has no published name")
        converted[published] = value
    if head_positions:
        converted[_HEAD_POSITION] = torch.stack([head_positions[k] for k in sorted(head_positions)])
    return converted


def computed_tensors(
    state_dict: dict[str, Tensor], window_size: int = 0, global_blocks: list[int] = (), global_size: int = 0
) -> dict[str, Tensor]:
    """What the published code expects in a file beside the parameters: counters of batch norm and rotary tables.

    Args:
        state_dict: parameters by published name.
        window_size: side of the windows of a ViT, in patches.
        global_blocks: the blocks of a ViT that attend to the whole image.
        global_size: side of the image in patches, where it is fixed; 0: global blocks have no table.
    """
    tensors = {
        name.removesuffix("running_var") + "num_batches_tracked": torch.tensor(0)
        for name in state_dict
        if name.startswith("backbone.") and name.endswith(".running_var")
    }
    blocks = sorted({int(name.split(".")[2]) for name in state_dict if name.startswith("backbone.blocks.")})
    if blocks:
        sizes = {"win": window_size} | ({"glb": global_size} if global_size else {})
        tables = {kind: rotary_tables(size, size, _HEAD_DIM) for kind, size in sizes.items()}
        places = {f"rope_{kind}": kind for kind in tables}
        places |= {f"blocks.{i}.attn.rope": "glb" if i in global_blocks else "win" for i in blocks}
        for place, kind in places.items():
            if kind in tables:
                for part, table in zip(("cos", "sin"), tables[kind]):
                    tensors[f"backbone.{place}.freqs_{part}"] = table
    return tensors


def describe(unused: dict[str, str]) -> list[str]:
    """One line for each reason in {name: reason}, with its first names."""
    names = defaultdict(list)
    for name, reason in unused.items():
        names[reason].append(name)
    return [
        f"{len(group)} ({reason}): {', '.join(group[:4])}{', ...' if len(group) > 4 else ''}"
        for reason, group in names.items()
    ]


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


def _table(is_vit: bool, is_dino: bool) -> tuple[list[tuple[re.Pattern, str]], list[tuple[re.Pattern, str]]]:
    """The rows for a family of models, from published to ours and back."""
    first = (_VIT_ROWS if is_vit else ([], []), _DINO_ROWS if is_dino else ([], []))
    return tuple([*first[0][i], *first[1][i], *_ROWS[i]] for i in (0, 1))


_ROWS, _VIT_ROWS, _DINO_ROWS = (
    (_compile(names), _compile([(ours, published) for published, ours in names]))
    for names in (_NAMES, _VIT_NAMES, _DINO_NAMES)
)


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
