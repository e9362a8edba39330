"""Which images a model is trained on and which it is evaluated on."""

import random
from collections.abc import Collection, Hashable, Sequence

import numpy as np

from ..errors import InputError

__all__ = ["choose_validation", "split_images"]


def split_images(
    images: Sequence[dict], classes: Sequence[Collection[int]], share: float, seed: int, groups: Sequence[Hashable]
) -> list[str]:
    """The split of each image: that of the export, and what it lacks of a validation set chosen from the training set.

    Where the export names no split for some image, or only one, all are split anew.

    Args:
        images: of an export; ``split`` is looked at.
        classes: of each image, the classes that it has objects of.
        share: see :func:`choose_validation`.
        seed: likewise.
        groups: of each image, what it stays together with.

    Returns:
        "train", "val" or "test" for each image.

    Raises:
        InputError: there is nothing left to train on.
    """
    splits = [x["split"] for x in images]
    if "" in splits or len(set(splits)) == 1:
        splits = ["train"] * len(images)
    if "val" not in splits:
        candidates = [i for i, split in enumerate(splits) if split == "train"]
        if len({groups[i] for i in candidates}) < 2:
            raise InputError(
                "there are no two pictures (with --group-by-folder: no two folders) to train on, which can be split. "
                "Add more, or choose the split in the labelling tool."
            )
        chosen = choose_validation([classes[i] for i in candidates], share, seed, [groups[i] for i in candidates])
        for i, is_chosen in zip(candidates, chosen):
            splits[i] = "val" if is_chosen else "train"
    if "train" not in splits:
        raise InputError("the export has no pictures to train on, only others. Choose another split when exporting.")
    return splits


def choose_validation(
    classes: Sequence[Collection[int]], share: float, seed: int, groups: Sequence[Hashable] | None = None
) -> list[bool]:
    """Choose the images of a validation set, so that each class has its share of them there.

    The rarest class comes first, and its images go where most of them are missing (iterative stratification, Sechidis
    et al. 2011). A class in two groups or more gets at least one of them on either side where that is possible, one in
    a single group is trained on.

    Args:
        classes: of each image, the classes that it has objects of.
        share: of the validation set, above 0 and below 1.
        seed: of what is chosen at random; the same arguments give the same choice.
        groups: of each image, a group, such as its folder; images of a group stay together. None: each is its own.

    Returns:
        For each image whether it is of the validation set. At least one is, and at least one isn't, where there are two
        groups or more.
    """
    names = list(dict.fromkeys(groups if groups is not None else range(len(classes))))
    index = {name: i for i, name in enumerate(names)}
    owner = np.array([index[x] for x in groups] if groups is not None else range(len(classes)))
    labels = sorted({x for image in classes for x in image})
    # [G, C + 1]: how many images of each group have objects of each class, and how many there are
    counts = np.zeros((len(names), len(labels) + 1))
    for group, image in zip(owner, classes):
        counts[group, -1] += 1
        for label in set(image):
            counts[group, labels.index(label)] += 1
    present = counts > 0
    wanted = share * counts.sum(axis=0)
    is_twice = present.sum(axis=0) >= 2
    wanted[is_twice] = np.maximum(wanted, 1)[is_twice]
    missing = np.stack([counts.sum(axis=0) - wanted, wanted])  # [train and val, C + 1]

    order = list(range(len(names)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda group: -counts[group, -1])  # large groups first, while there is room; the sort is stable
    shares = np.array([1 - share, share])
    side = np.full(len(names), -1)
    while (side < 0).any():
        left = present[side < 0].sum(axis=0)
        # Images without objects come last: of them only the number counts.
        label = min((x for x in range(counts.shape[1]) if left[x]), key=lambda x: (x == len(labels), left[x]))
        for group in order:
            if side[group] < 0 and present[group, label]:
                lack, lack_of_images = missing[:, label] / shares, missing[:, -1] / shares
                wants_val = (lack[1], lack_of_images[1]) > (lack[0], lack_of_images[0])
                wants_val &= is_twice[label]  # what is there once is better learnt than only asked for
                side[group] = wants_val and counts[group, -1] <= max(missing[1, -1], 1)
                missing[side[group]] -= counts[group]
    largest = 2 * wanted[-1]
    if len(names) >= 2 and not side.any():  # every group is larger than the share
        side[order[-1]] = 1
    _put_on_both_sides(side, present, [x for x in reversed(order) if counts[x, -1] <= largest])
    return (side[owner] == 1).tolist()


def _put_on_both_sides(side: np.ndarray, present: np.ndarray, movable: list[int]) -> None:
    """Move groups, in place, so that classes of several groups are on both sides, where that costs no other class."""

    def is_lost(label: int) -> bool:
        return present[:, label].sum() >= 2 and len(set(side[present[:, label]])) == 1

    labels = range(present.shape[1])
    for label in filter(is_lost, labels):
        for group in (x for x in movable if present[x, label]):
            lost = sum(map(is_lost, labels))
            side[group] = 1 - side[group]
            if sum(map(is_lost, labels)) < lost:
                break
            side[group] = 1 - side[group]
