"""The published models' parameters <-> ours, by tables of names that read both ways.

Each component has its own table (``PUBLISHED_NAMES``, see :mod:`codetr_d2.modeling.facts`) of rows (published, ours).
The first row that fits counts, in both directions. In braces stand ``{n}``, ``{m}`` for a number, ``{norm}`` for one
that is larger by one in ours, ``{last}`` for that of the encoder's branch behind the decoder layers', ``{head}`` for an
auxiliary head, by its position in the published names and by its own name in ours, and ``{rest}`` for anything.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.utils.registry import Registry
from torch import Tensor

from ..modeling.auxiliary import AUX_HEAD_REGISTRY
from ..modeling.backbones.eva02 import rotary_tables
from ..modeling.facts import PublishedNames, under
from ..modeling.query_heads import QUERY_HEAD_REGISTRY

__all__ = [
    "COUNTER",
    "FOREIGN",
    "ROTARY",
    "codetr_to_published",
    "computed_tensors",
    "describe",
    "is_published",
    "name_positive_queries",
    "published_to_codetr",
]

_TRANSFORMER = "query_head.transformer"
_HEAD_POSITION = f"{_TRANSFORMER}.head_pos_embed.weight"
_HEAD_DIM = 64  # channels of an attention head of the published ViTs
_PUBLISHED_HEADS = ["roi", "atss"]  # the first positive queries are theirs; then other heads', as a file has them

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
    rows = _rows(state_dict, to_published=False)
    rows_of_heads = {head: _compile(names) for head, names in _names_of_auxiliary_heads().items()}
    heads = _in_published_order(
        head for name in state_dict for head, own in rows_of_heads.items() if any(row.fullmatch(name) for row, _ in own)
    )
    heads = heads or _PUBLISHED_HEADS  # a file without the heads themselves
    positions = {str(k): head for k, head in enumerate(heads)}
    converted, unused = {}, {}
    for name, value in state_dict.items():
        if name == _HEAD_POSITION:  # [heads, 1] -> one [1] for each head
            converted |= {f"query_head.positive_queries.{heads[k]}.head_embed": row for k, row in enumerate(value)}
        elif name.endswith(".num_batches_tracked"):
            unused[name] = COUNTER
        elif name.endswith((".freqs_cos", ".freqs_sin")):
            unused[name] = ROTARY
        elif name.startswith("ema_"):
            unused[name] = _AVERAGED
        elif (ours := _translate(name, rows, last, shift=1, heads=positions)) is not None:
            converted[ours] = value
        else:
            unused[name] = FOREIGN
    return converted, unused


def codetr_to_published(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`published_to_codetr`.

    Args:
        state_dict: parameters by our names.

    Raises:
        KeyError: a parameter has no published name.
    """
    last = 1 + max(
        (int(name.split(".")[3]) for name in state_dict if name.startswith("query_head.decoder.class_embed.")),
        default=-1,
    )
    state_dict = name_positive_queries(state_dict)
    rows = _rows(state_dict, to_published=True)
    heads = _in_published_order(_head_of(name) for name in state_dict)
    positions = {head: str(k) for k, head in enumerate(heads)}
    converted, head_positions = {}, {}
    for name, value in state_dict.items():
        if (match := re.fullmatch(r"query_head\.positive_queries\.(\w+)\.head_embed", name)) and match[1] in heads:
            head_positions[heads.index(match[1])] = value
        elif (published := _translate(name, rows, last, shift=-1, heads=positions)) is not None:
            converted[published] = value
        else:
            raise KeyError(f"{name} has no published name")
    if head_positions:
        converted[_HEAD_POSITION] = torch.stack([head_positions[k] for k in sorted(head_positions)])
    return converted


def name_positive_queries(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name positive queries after their auxiliary heads, in older files of ours, which number them by their order."""
    heads = list(dict.fromkeys(filter(None, map(_head_of, state_dict))))
    positions = {str(k): head for k, head in enumerate(heads)}
    return {
        re.sub(
            r"(?<=^query_head\.positive_queries\.)\d+(?=\.)", lambda match: positions.get(match[0], match[0]), name
        ): value
        for name, value in state_dict.items()
    }


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


def _head_of(name: str) -> str | None:
    """The auxiliary head that a parameter belongs to, by our names."""
    return name.split(".")[1] if name.startswith("auxiliary_heads.") else None


def _in_published_order(heads: Iterable[str | None]) -> list[str]:
    """Auxiliary heads of a file, as its parameters name them, in the order of the published positive queries."""
    heads = dict.fromkeys(filter(None, heads))
    return [*(head for head in _PUBLISHED_HEADS if head in heads), *(x for x in heads if x not in _PUBLISHED_HEADS)]


def _names_of_auxiliary_heads() -> dict[str, PublishedNames]:
    """What the registered auxiliary heads say, with our whole names."""
    return {
        kind: under(f"auxiliary_heads.{kind}", head.PUBLISHED_NAMES)
        for kind, head in AUX_HEAD_REGISTRY
        if hasattr(head, "PUBLISHED_NAMES")
    }


def _rows(state_dict: dict[str, Tensor], to_published: bool) -> list[tuple[re.Pattern, str]]:
    """What the registered components say, from published to our names or back.

    A file has one backbone and one query head, which may use the same name for other things: those count whose names
    fit the most of the file, and of equal ones the one with the fewest, which lacks the least.
    """

    def compiled(names: PublishedNames) -> list[tuple[re.Pattern, str]]:
        return _compile([(ours, published) for published, ours in names] if to_published else names)

    def best(prefix: str, registry: Registry) -> list[tuple[re.Pattern, str]]:
        candidates = [compiled(under(prefix, getattr(component, "PUBLISHED_NAMES", ()))) for _, component in registry]

        def fit(rows: list[tuple[re.Pattern, str]]) -> tuple[int, int]:
            return sum(any(row.fullmatch(x) for row, _ in rows) for x in state_dict), -len(rows)

        return max(candidates, key=fit)

    rows = [*best("backbone", BACKBONE_REGISTRY), *best("query_head", QUERY_HEAD_REGISTRY)]
    rows += [row for names in _names_of_auxiliary_heads().values() for row in compiled(names)]
    return rows + [row for _, model in META_ARCH_REGISTRY for row in compiled(getattr(model, "PUBLISHED_NAMES", []))]


def _compile(names: list[tuple[str, str]]) -> list[tuple[re.Pattern, str]]:
    """(template, template) -> (regular expression, template)."""
    rows = []
    for source, target in names:
        pattern = re.escape(source)
        for field in re.findall(r"\{(\w+)\}", source):
            expression = {"rest": ".+", "head": r"\w+"}.get(field, r"\d+")
            pattern = pattern.replace(re.escape(f"{{{field}}}"), f"(?P<{field}>{expression})")
        rows.append((re.compile(pattern), target))
    return rows


def _translate(
    name: str, rows: list[tuple[re.Pattern, str]], last: int, shift: int, heads: dict[str, str]
) -> str | None:
    """Translate one name.

    Args:
        name: of a parameter.
        rows: from :func:`_rows`.
        last: number of the encoder's branch, behind the decoder layers'.
        shift: what is added to ``{norm}``.
        heads: what ``{head}`` becomes.
    """
    for pattern, target in rows:
        if (match := pattern.fullmatch(name)) is None:
            continue
        fields = match.groupdict()
        if int(fields.get("last", last)) != last:
            continue
        if "norm" in fields:
            fields["norm"] = str(int(fields["norm"]) + shift)
        if "head" in fields:
            if fields["head"] not in heads:
                continue
            fields["head"] = heads[fields["head"]]
        return target.format(**{"last": last, **fields})
    return None
