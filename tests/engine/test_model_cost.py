"""The FLOPs of a run's model, in its log."""

import logging

import pytest
import torch
from detectron2.utils import comm

from codetr_d2.analysis.cost import build_with_random_weights, measure_cost
from codetr_d2.engine import load_config, model_cost, setup
from codetr_d2.engine.trainer import CoDETRTrainer
from tests.tiny_run import write_tiny_run


@pytest.fixture
def train(coco_json, tmp_path):
    """A function (folder, KEY, VALUE, ...): train a small CoDETR for two iterations; gives its log and its weights."""
    opts = ("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.CODETR.NUM_CLASSES", 3, "MODEL.CODETR.CLASS_NAMES", [])
    opts += ("SOLVER.MAX_EPOCHS", 0, "SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "DATASETS.TEST", (), "SEED", 1)
    opts += ("DATALOADER.NUM_WORKERS", 0, "INPUT.MIN_SIZE_TEST", 32, "INPUT.MAX_SIZE_TEST", 48)
    write_tiny_run(tmp_path / "written", coco_json, opts)

    def train(name):
        cfg = load_config(str(tmp_path / "written" / "config.yaml"), ["OUTPUT_DIR", str(tmp_path / name)])
        trainer = CoDETRTrainer(setup(cfg))
        trainer.train()
        weights = torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
        return (tmp_path / name / "log.txt").read_text(), weights, trainer.cfg

    return train


@pytest.mark.slow
def test_the_log_says_what_the_model_costs_and_the_training_does_not_notice(train, monkeypatch):
    log, weights, cfg = train("counted")
    gflops = measure_cost(build_with_random_weights(cfg), (32, 48), repeat=1).total.flops / 1e9
    assert f"{gflops:.2f} GFLOPs at inference, for one image of 32 x 48 pixels; a multiplication" in log
    assert "million parameters" in log

    def fail(model, size):
        raise RuntimeError("no such operator\nin any mode")

    monkeypatch.setattr(model_cost, "detection_flops", fail)
    log, others, _ = train("not_counted")
    assert "FLOPs are not known: no such operator" in log and "GFLOPs" not in log
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_sizes_and_models(make_config, monkeypatch, caplog):
    cfg = make_config("INPUT.MIN_SIZE_TEST", 48, "INPUT.MAX_SIZE_TEST", 40, "MODEL.MASK_ON", True).clone()
    cfg.defrost()
    monkeypatch.setattr(model_cost, "detection_flops", lambda model, size: 1000 * size[0] * size[1])
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(logging.getLogger("codetr_d2"), "propagate", True)  # which a run's own log ends
    model_cost.log_detection_flops(cfg, torch.nn.Identity())  # not CoDETR
    assert "FLOPs" not in caplog.text
    monkeypatch.setattr(model_cost, "CoDETR", torch.nn.Identity)

    def logged():
        caplog.clear()
        model_cost.log_detection_flops(cfg, torch.nn.Identity())
        return caplog.messages[-1]

    assert logged().startswith("0.00 GFLOPs at inference, for one image of 40 x 40 pixels without its masks;")
    cfg.INPUT.MIN_SIZE_TEST, cfg.MODEL.MASK_ON = 0, False
    assert logged().startswith("1.07 GFLOPs at inference, for one image of 800 x 1333 pixels;")
    cfg.MODEL.CODETR.CANVAS_SIZE = 1024
    assert logged().startswith("1.05 GFLOPs at inference, for one image of 1024 x 1024 pixels;")


def test_the_main_process_counts_alone(make_config, monkeypatch):
    called = []
    monkeypatch.setattr("codetr_d2.engine.trainer.log_detection_flops", lambda cfg, model: called.append(model))
    trainer = CoDETRTrainer(make_config())
    assert called == [trainer.bare_model]
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    CoDETRTrainer(make_config())
    assert len(called) == 1
