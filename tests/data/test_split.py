import itertools
import random

import pytest

from codetr_d2.data.split import choose_validation, split_images
from codetr_d2.errors import InputError


def random_classes(rng, number, num_classes):
    """Images with up to three classes, low numbers far more often than high ones, and some without any."""
    weights = [1 / (i + 1) ** 1.5 for i in range(num_classes)]
    return [set(rng.choices(range(num_classes), weights, k=rng.randrange(4))) for _ in range(number)]


def counts(classes, chosen):
    """By class, how many images have it in the training set and in the validation set."""
    found = {}
    for image, is_val in zip(classes, chosen):
        for label in image:
            found.setdefault(label, [0, 0])[is_val] += 1
    return found


@pytest.mark.parametrize("seed, share", list(itertools.product(range(4), (0.1, 0.15, 0.3))))
def test_each_class_has_its_share(seed, share):
    classes = random_classes(random.Random(seed), 400, 12)
    chosen = choose_validation(classes, share, seed)
    assert sum(chosen) == pytest.approx(share * len(chosen), rel=0.15)
    for train, val in counts(classes, chosen).values():
        assert abs(val - share * (train + val)) <= max(2, 0.3 * share * (train + val))
        assert train + val < 2 or (train and val)


def test_the_same_seed_chooses_the_same_and_another_another():
    classes = random_classes(random.Random(0), 100, 5)
    first, again, other = (choose_validation(classes, 0.2, seed) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together(seed):
    rng = random.Random(seed)
    classes = random_classes(rng, 300, 6)
    groups = [rng.randrange(30) for _ in classes]
    chosen = choose_validation(classes, 0.2, seed, groups)
    sides = {(group, is_val) for group, is_val in zip(groups, chosen)}
    assert len(sides) == len(set(groups))
    assert 0.1 < sum(chosen) / len(chosen) < 0.3


def test_a_group_of_nearly_all_images_is_trained_on():
    """Its rare class is wanted in the validation set, but 90 of 100 images are too many."""
    classes = [{0}] * 88 + [{0, 1}] * 2 + [{0}] * 9 + [{0, 1}]
    chosen = choose_validation(classes, 0.15, 0, ["large"] * 90 + ["small"] * 10)
    assert chosen == [False] * 90 + [True] * 10


@pytest.mark.parametrize("seed", range(5))
def test_a_class_in_one_image_is_trained_on(seed):
    chosen = choose_validation([{0}, {0}, {1, 2}], 0.15, seed)
    assert sorted(chosen[:2]) == [False, True] and not chosen[2]


@pytest.mark.parametrize("seed", range(5))
def test_two_images_are_one_and_one(seed):
    assert sorted(choose_validation([{0}, {0}], 0.01, seed)) == [False, True]
    assert sorted(choose_validation([set(), set()], 0.9, seed)) == [False, True]


def images(*splits):
    return [{"split": x} for x in splits]


def split(*splits, share=0.5, groups=None):
    return split_images(images(*splits), [{0}] * len(splits), share, 0, groups or range(len(splits)))


def test_the_split_of_the_export_stays():
    assert split("train", "val", "train", "test") == ["train", "val", "train", "test"]


def test_a_missing_validation_set_comes_from_the_training_set():
    found = split("train", "train", "train", "train", "test", "test")
    assert found[4:] == ["test", "test"] and sorted(found[:4]) == ["train", "train", "val", "val"]


@pytest.mark.parametrize("splits", [("", "", "", ""), ("test",) * 4, ("train", "", "val", "")])
def test_an_incomplete_split_is_made_anew(splits):
    assert sorted(split(*splits)) == ["train", "train", "val", "val"]


def test_nothing_to_split():
    with pytest.raises(InputError, match="no two pictures"):
        split("train", "test")
    with pytest.raises(InputError, match="no two folders"):
        split("", "", groups=["a", "a"])
    with pytest.raises(InputError, match="no pictures to train on"):
        split("val", "test")
