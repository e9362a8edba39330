"""``TEST.STABILITY_IMAGES``: the file of matches, and a training that does not notice."""

import json

import pytest

from codetr_d2.engine import check_config, load_config, setup
from codetr_d2.engine.trainer import CoDETRTrainer
from codetr_d2.errors import InputError
from tests.tiny_run import write_tiny_run


@pytest.fixture
def run(coco_json, tmp_path):
    """A function (folder, number of iterations, images, resume=False): train a small model for 6 iterations at most."""
    opts = ("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.CODETR.NUM_CLASSES", 3, "MODEL.CODETR.CLASS_NAMES", [])
    opts += ("MODEL.CODETR.AUX_HEADS", ["atss"])
    write_tiny_run(tmp_path / "written", coco_json, opts)

    def train(name, iterations, num_images, resume=False):
        options = {
            "OUTPUT_DIR": tmp_path / name,
            "SEED": 1,
            "SOLVER.MAX_EPOCHS": 0,
            "SOLVER.MAX_ITER": 6,
            "SOLVER.IMS_PER_BATCH": 2,
            "SOLVER.CHECKPOINT_PERIOD": 1,
            "DATALOADER.NUM_WORKERS": 0,
            "TEST.EVAL_PERIOD": 2,
            "TEST.STABILITY_IMAGES": num_images,
        }
        config_file = str(tmp_path / "written" / "config.yaml")
        cfg = load_config(config_file, [str(x) for pair in options.items() for x in pair])
        (tmp_path / name).mkdir(exist_ok=True)
        trainer = CoDETRTrainer(setup(cfg))
        trainer.resume_or_load(resume)
        trainer.max_iter = iterations
        trainer.train()
        return tmp_path / name

    return train


@pytest.mark.slow
def test_matches_of_each_evaluation_and_exact_resume(run, assert_same_weights):
    plain, whole = run("plain", 6, 0), run("whole", 6, 3)
    assert not (plain / "matches.json").exists()
    assert_same_weights(plain / "model_0000005.pth", whole / "model_0000005.pth")
    matches = json.loads((whole / "matches.json").read_text())
    assert [x["iteration"] for x in matches["evaluations"]] == [1, 3, 5]
    assert len(matches["image_ids"]) == 3
    for x in matches["evaluations"]:
        assert [len(queries) for queries in x["queries_of_objects"]] == [2, 2, 2]  # each image has two objects
        assert all(0 <= query < 20 for queries in x["queries_of_objects"] for query in queries)

    # Iterations 3 and 4 are lost: the run goes on from the checkpoint of iteration 2.
    cut = run("cut", 5, 3)
    for name in ("model_0000003.pth", "model_0000004.pth", "model_final.pth"):
        (cut / name).unlink()
    (cut / "last_checkpoint").write_text("model_0000002.pth")
    run("cut", 6, 3, resume=True)
    assert json.loads((cut / "matches.json").read_text()) == matches
    assert_same_weights(whole / "model_0000005.pth", cut / "model_0000005.pth")


@pytest.mark.parametrize("others", [("TEST.EVAL_PERIOD", 0), ("DATASETS.TEST", "()")])
def test_matches_need_evaluations(config_file, others):
    cfg = load_config(str(config_file), ["TEST.STABILITY_IMAGES", "5", "TEST.EVAL_PERIOD", "2"])
    cfg.merge_from_list(list(others))
    with pytest.raises(InputError, match="TEST.STABILITY_IMAGES is 5, but .* set TEST.EVAL_PERIOD"):
        check_config(cfg)
