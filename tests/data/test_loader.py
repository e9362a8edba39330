import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg

from codetr_d2.data.loader import build_test_loader, build_train_loader
from codetr_d2.data.samplers import BatchStream, derive_seed, seed_rng
from codetr_d2.errors import InputError

GROUPS = [0, 1, 1, 0, 1, 1, 1]


def take(stream, n):
    return list(itertools.islice(stream, n))


def make_stream(**options):
    return BatchStream(**{"repeat_factors": np.ones(7), "groups": GROUPS, "total_batch_size": 4, "seed": 3, **options})


def test_stream_depends_on_the_seed_and_the_position_alone():
    torch.manual_seed(1)
    first = take(make_stream(), 30)
    torch.manual_seed(2)
    assert take(make_stream(), 30) == first
    assert take(make_stream(start_iteration=11), 19) == first[11:]
    assert take(make_stream(seed=4), 30) != first


def test_stream_of_several_processes_is_that_of_one():
    shares = [take(make_stream(rank=rank, world_size=2), 20) for rank in range(2)]
    assert [a + b for a, b in zip(*shares)] == take(make_stream(), 20)


def test_batches_hold_one_aspect_group_and_every_sample_has_its_own_seed():
    batches = take(make_stream(), 50)
    assert all(len({GROUPS[index] for index, _ in batch}) == 1 for batch in batches)
    seeds = [seed for batch in batches for _, seed in batch]
    assert len(set(seeds)) == len(seeds)


def test_an_epoch_is_a_permutation():
    draws = [index for batch in take(make_stream(groups=None), 70) for index, _ in batch]
    epochs = [draws[i : i + 7] for i in range(0, len(draws), 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 30


def test_repeat_factors_are_met_on_average():
    factors = [1.0, 2.5, 1.25]
    stream = BatchStream(factors, None, 1, seed=0)
    counts = Counter(index for batch in take(stream, 1900) for index, _ in batch)  # about 400 epochs
    for index, factor in enumerate(factors):
        assert counts[index] / 400 == pytest.approx(factor, rel=0.05)


def test_derived_seeds_differ():
    parts = [(0, "step", i, rank) for i in range(100) for rank in range(4)] + [(1, "step", 0, 0), (0, "sample", 0, 0)]
    assert len({derive_seed(*x) for x in parts}) == len(parts)


def test_seeding_is_that_of_the_libraries():
    seed_rng(7)
    drawn = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    assert drawn == (random.random(), np.random.rand(), torch.rand(()).item())


def noisy_mapper(record):
    if record.get("fault"):
        raise record["fault"]
    noise = (random.random(), np.random.rand(), torch.rand(()).item())
    return {**record, "noise": noise}


def make_records(n=6):
    return [{"file_name": f"{i}.png", "width": 2 + i % 2, "height": 2, "index": i} for i in range(n)]


def make_loader(records, workers=0, seed=5, start=0, **options):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.DATALOADER.NUM_WORKERS = workers
    for key, value in options.items():
        cfg.DATALOADER[key] = value
    loader = build_train_loader(cfg, records, noisy_mapper)
    loader.batch_sampler.seed, loader.batch_sampler.start_iteration = seed, start
    return loader


def test_samples_do_not_depend_on_workers_or_on_where_the_run_starts():
    expected = take(make_loader(make_records()), 9)
    assert take(make_loader(make_records(), workers=2, start=4), 5) == expected[4:]
    assert len({sample["noise"] for batch in expected for sample in batch}) == 18
    for batch in expected:
        assert batch[0]["width"] == batch[1]["width"]


def test_loading_in_this_process_leaves_its_random_generators_alone():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
    batches = make_loader(make_records())._dataset_kind  # building draws nothing either
    samples = build_test_loader(_cpu_config(), make_records(), noisy_mapper).dataset
    assert batches is not None and samples[0, 1]["noise"] != samples[0, 2]["noise"]
    assert draw() == expected


def _cpu_config(workers=0):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATALOADER.NUM_WORKERS = workers
    return cfg


def test_rare_categories_are_repeated():
    records = [{**r, "annotations": [{"category_id": int(r["index"] == 0)}]} for r in make_records(20)]
    options = {"SAMPLER_TRAIN": "RepeatFactorTrainingSampler", "REPEAT_THRESHOLD": 0.8, "ASPECT_RATIO_GROUPING": False}
    batches = take(make_loader(records, **options), 400)
    counts = Counter(sample["index"] for batch in batches for sample in batch)
    # f = 1 / 20 for the rare category: its image comes sqrt(0.8 / 0.05) = 4 times as often.
    assert counts[0] / np.mean([counts[i] for i in range(1, 20)]) == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", [InputError("0.png: broken"), OSError("image file is truncated")])
def test_a_faulty_image_stops_with_one_line_that_names_it(workers, fault):
    records = [{**make_records(1)[0], "fault": fault}] * 2
    with pytest.raises(InputError, match=r"^0\.png.*(broken|truncated)$") as error:
        take(make_loader(records, workers), 1)
    assert "\n" not in str(error.value)


def test_a_mapper_that_returns_nothing_is_an_error():
    cfg = _cpu_config()
    with pytest.raises(InputError, match="0.png"):
        list(build_test_loader(cfg, make_records(1), lambda record: None))


def test_grouping_needs_sizes():
    with pytest.raises(InputError, match="a.png.*ASPECT_RATIO_GROUPING"):
        make_loader([{"file_name": "a.png"}])


def test_test_loader_gives_every_image_once_in_order():
    batches = list(build_test_loader(_cpu_config(workers=2), make_records(), noisy_mapper))
    assert [[sample["index"] for sample in batch] for batch in batches] == [[i] for i in range(6)]
