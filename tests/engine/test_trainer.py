import errno
import json
import math
import os
from collections import defaultdict
from contextlib import nullcontext

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from torch import nn

import train_net
from codetr_d2.checkpoint.checkpointer import CoDETRCheckpointer
from codetr_d2.engine import check_config, evaluate, setup
from codetr_d2.engine.optimizer import build_optimizer
from codetr_d2.engine.trainer import CoDETRTrainer, StepTrainer
from codetr_d2.engine.writers import MetricsWriter, drop_metrics_from
from codetr_d2.errors import InputError
from codetr_d2.evaluation import DetectionEvaluator
from codetr_d2.modeling.facts import ClassRows
from codetr_d2.modeling.postprocess import detections_from_queries

FULL_CLIPPING = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model")


def load(path):
    return torch.load(path, weights_only=True)


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_a_run_leaves_what_is_needed(run_training, tmp_path):
    opts = ("SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 2, "SOLVER.EMA.ENABLED", True, *FULL_CLIPPING)
    trainer = run_training(*opts)
    folder = tmp_path / "run"
    assert {"model_0000003.pth", "model_0000004.pth", "model_0000005.pth"} == set(
        name for name in os.listdir(folder) if name.startswith("model_0")
    )
    assert (folder / "last_checkpoint").read_text() == "model_0000005.pth"
    assert any(name.startswith("events.out.tfevents") for name in os.listdir(folder))
    entries = metrics_of(folder)
    evaluations = [entry for entry in entries if "bbox/AP" in entry]
    assert [entry["iteration"] for entry in evaluations] == [1, 3, 6]
    assert evaluations[-1]["bbox/AP"] == trainer._last_eval_results["bbox"]["AP"]
    assert {"total_loss", "loss_cls", "loss_box", "grad_norm", "lr", "data_time"} <= entries[-2].keys()

    # Files to deploy hold the moving average and nothing of the training; detectron2's own predictor reads them.
    final, last = load(folder / "model_final.pth"), load(folder / "model_0000005.pth")
    assert final.keys() == load(folder / "model_best.pth").keys() == {"model", "iteration"}
    assert {"model", "ema", "trainer"} <= last.keys()
    assert torch.equal(final["model"]["box_embed.weight"], last["ema"]["box_embed.weight"])
    assert not torch.equal(final["model"]["box_embed.weight"], last["model"]["box_embed.weight"])
    cfg = trainer.cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(folder / "model_final.pth")
    predictor = DefaultPredictor(cfg)
    assert torch.equal(predictor.model.box_embed.weight, last["ema"]["box_embed.weight"])
    assert cfg.MODEL.CODETR.CLASS_NAMES == ["class0", "class1", "class2"]

    # Evaluation by itself gives what the training's last one gave: from the final file and the training checkpoint.
    for weights in ("model_final.pth", "model_0000005.pth"):
        cfg.MODEL.WEIGHTS = str(folder / weights)
        assert evaluate(cfg)["bbox"] == pytest.approx(trainer._last_eval_results["bbox"], nan_ok=True)


class Regression(nn.Module):
    """Mean squared error over the batch of numbers that it is given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1, dtype=torch.float64)
        self.scale = 1.0

    def forward(self, batch):
        x = torch.stack([sample["x"] for sample in batch])
        error = self.layer(x).squeeze(1) - x.prod(1)
        return {"loss_a": (error**2).mean() * self.scale, "loss_b": error.abs().mean()}


def step_trainer(cfg, batches, model):
    return StepTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.1), cfg)


def random_batches(n, size):
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(n, size, 2, generator=generator, dtype=torch.float64)
    return [[{"x": x, "file_name": f"image{i}.png"} for i, x in enumerate(batch)] for batch in points]


def test_accumulated_micro_batches_equal_the_whole_batch(make_config):
    results = {}
    for steps in (1, 4):
        torch.manual_seed(0)
        trainer = step_trainer(make_config("SOLVER.ACCUMULATE_STEPS", steps), random_batches(3, 8), Regression())
        with EventStorage() as storage:
            for trainer.iter in range(3):
                trainer.run_step()
        results[steps] = (trainer.model.layer.weight.detach(), storage.latest())
    torch.testing.assert_close(results[1][0], results[4][0], rtol=1e-12, atol=1e-12)
    for name in ("loss_a", "loss_b", "total_loss", "grad_norm"):
        assert results[4][1][name][0] == pytest.approx(results[1][1][name][0])


def test_a_step_is_clipped_over_the_whole_model(make_config):
    torch.manual_seed(0)
    cfg = make_config(*FULL_CLIPPING, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01)
    model = Regression()
    before = [p.detach().clone() for p in model.parameters()]
    trainer = step_trainer(cfg, random_batches(1, 4), model)
    with EventStorage() as storage:
        trainer.run_step()
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, model.parameters())])
    assert moved.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)  # learning rate times the clipped norm
    assert storage.latest()["grad_norm"][0] > 0.01


@pytest.mark.parametrize("torch_keeps_it", [True, False])
def test_a_step_with_loss_scaling_is_clipped(make_config, monkeypatch, torch_keeps_it):
    """GradScaler sets the attribute that a fused step reads its divisor from; older ones overwrite what is there."""
    cfg = make_config(*FULL_CLIPPING, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01)
    moments = []
    for scaling in (False, True):
        torch.manual_seed(0)
        model = Regression()
        trainer = StepTrainer(model, random_batches(1, 4), build_optimizer(cfg, model), cfg)
        if scaling:
            trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            if not torch_keeps_it:
                forgotten = property(lambda self: None, lambda self, value: None, lambda self: None)
                monkeypatch.setattr(torch.optim.AdamW, "grad_scale", forgotten, raising=False)
        with EventStorage():
            trainer.run_step()
        moments.append(torch.cat([x["exp_avg"].flatten() for x in trainer.optimizer.state.values()]))
    assert moments[0].norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)  # AdamW's share of a new gradient
    torch.testing.assert_close(moments[1], moments[0])


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(make_config, scale):
    model = Regression()
    model.scale = scale
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = step_trainer(make_config(), random_batches(1, 2), model)
    trainer.iter = 41
    with EventStorage(), pytest.raises(InputError, match=r"iteration 41.*loss_a=.*image0\.png, image1\.png"):
        trainer.run_step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_gradient_that_is_not_finite_stops_too(make_config):
    class RootOfZero(Regression):
        def forward(self, batch):
            return {"loss": (self.layer.weight * 0).sum().sqrt()}  # 0, with an infinite derivative times 0

    with EventStorage(), pytest.raises(InputError, match="not finite: grad_norm=nan"):
        step_trainer(make_config(), random_batches(1, 2), RootOfZero()).run_step()


def test_an_error_of_detectron2s_rpn_names_iteration_and_images(make_config):
    class Diverged(Regression):
        def forward(self, batch):
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")

    with EventStorage(), pytest.raises(InputError, match=r"iteration 0: Predicted boxes.*image1\.png"):
        step_trainer(make_config(), random_batches(1, 2), Diverged()).run_step()


def test_a_diverged_run_keeps_its_checkpoints_and_is_not_evaluated(make_config, tmp_path):
    trainer = CoDETRTrainer(make_config("SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 4))
    run_step = trainer.run_step

    def run_step_with_fault():
        if trainer.iter == 3:  # the last one
            with torch.no_grad():
                trainer.model.class_embed.bias.fill_(math.nan)
        run_step()

    trainer.run_step = run_step_with_fault
    with pytest.raises(
        InputError, match=r"iteration 3.*loss_cls=nan.*\.png.*last whole checkpoint is .*model_0000001.pth"
    ):
        trainer.train()
    assert not hasattr(trainer, "_last_eval_results")
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not (tmp_path / "run" / "model_final.pth").exists()
    assert all(x.isfinite().all() for x in load(tmp_path / "run" / "model_0000001.pth")["model"].values())


def test_bfloat16_on_the_cpu_is_for_training_alone(run_training, make_config):
    opts = ("SOLVER.AMP.ENABLED", True, "SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()")
    trainer = run_training(*opts)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())

    seen = []
    trainer.model.class_embed.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.model.train()
    seen.clear()
    with EventStorage():
        trainer.run_step()
        cfg = make_config(*opts, "DATASETS.TEST", "('tiny_test',)")
        trainer.test(cfg, trainer.model)
    assert seen == [torch.bfloat16] + [torch.float32] * 5  # one step, five images


RESUME = (
    *("DATALOADER.NUM_WORKERS", 2, "SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.EMA.ENABLED", True, "SOLVER.MAX_ITER", 8),
    *("TEST.EVAL_PERIOD", 4, "SOLVER.EMA.WARMUP_ITERS", 3, *FULL_CLIPPING),
)


def test_a_resumed_run_ends_as_an_uninterrupted_one(run_training, make_config, tmp_path, assert_same_weights):
    run_training(*RESUME, "OUTPUT_DIR", tmp_path / "whole")

    trainer = CoDETRTrainer(make_config(*RESUME))
    run_step = trainer.run_step

    def run_step_until_interrupted():
        if trainer.iter == 5:
            raise KeyboardInterrupt
        run_step()

    trainer.run_step = run_step_until_interrupted
    trainer.resume_or_load(False)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    torch.manual_seed(99)  # nothing may depend on the state that the process happens to be in
    resumed = run_training(*RESUME, resume=True)
    assert resumed.start_iter == 3

    for name in ("model_0000005.pth", "model_0000007.pth", "model_best.pth", "model_final.pth"):
        assert_same_weights(tmp_path / "whole" / name, tmp_path / "run" / name)
    whole, again = load(tmp_path / "whole" / "model_0000007.pth"), load(tmp_path / "run" / "model_0000007.pth")
    for name, value in whole["ema"].items():
        assert torch.equal(value, again["ema"][name])
    assert whole["trainer"]["hooks"] == again["trainer"]["hooks"]
    entries = [
        [{k: v for k, v in entry.items() if "bbox" in k or k == "iteration"} for entry in metrics_of(tmp_path / folder)]
        for folder in ("whole", "run")
    ]
    assert str(entries[0]) == str(entries[1])  # as text, where nan equals nan


def test_resuming_a_finished_run_evaluates_it_again(run_training, tmp_path):
    first = run_training("SOLVER.MAX_ITER", 2)
    iterations = [entry["iteration"] for entry in metrics_of(tmp_path / "run")]
    again = run_training("SOLVER.MAX_ITER", 2, resume=True)
    assert again.start_iter == 2
    assert again._last_eval_results["bbox"] == pytest.approx(first._last_eval_results["bbox"], nan_ok=True)
    assert [entry["iteration"] for entry in metrics_of(tmp_path / "run")] == iterations


def test_a_run_can_be_prolonged_but_not_shortened(run_training, tmp_path):
    run_training("SOLVER.MAX_ITER", 3, "DATASETS.TEST", "()")
    assert run_training("SOLVER.MAX_ITER", 5, "DATASETS.TEST", "()", resume=True).start_iter == 3
    with pytest.raises(InputError, match="MAX_ITER is 4.*has done 5"):
        run_training("SOLVER.MAX_ITER", 4, "DATASETS.TEST", "()", resume=True)


def test_a_drawn_seed_is_kept(run_training):
    opts = ("SEED", -1, "DATASETS.TEST", "()")
    first = run_training(*opts, "SOLVER.MAX_ITER", 2)
    second = run_training(*opts, "SOLVER.MAX_ITER", 3, resume=True)
    assert second.seed == first.seed == second.data_loader.batch_sampler.seed
    assert run_training(*opts, "SOLVER.MAX_ITER", 2).seed != first.seed


SHORT = ("DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.STEPS", "(3,)", "SOLVER.WARMUP_ITERS", 0)


@pytest.mark.parametrize(
    "opts, rates, decay",
    [  # of the steps 2 and 3, before which the rate falls, for "backbone" and for everything else
        ((), [(0.01, 0.01), (0.001, 0.001)], 1e-4),
        (("SOLVER.BASE_LR", 0.5), [(0.5, 0.5), (0.05, 0.05)], 1e-4),
        (("SOLVER.WEIGHT_DECAY", 0.2), [(0.01, 0.01), (0.001, 0.001)], 0.2),
        (("SOLVER.STEPS", "(1,)", "SOLVER.GAMMA", 0.5), [(0.005, 0.005), (0.005, 0.005)], 1e-4),
        (("SOLVER.LR_MULTIPLIERS", "[['backbone', 0.1]]"), [(0.001, 0.01), (0.0001, 0.001)], 1e-4),
    ],
)
def test_a_resumed_run_has_the_solver_of_its_config(run_training, make_config, opts, rates, decay):
    first = run_training(*SHORT, "SOLVER.MAX_ITER", 2)
    state = state_by_name(first)
    trainer = CoDETRTrainer(make_config(*SHORT, "SOLVER.MAX_ITER", 4, *opts))
    trainer.resume_or_load(True)
    again = state_by_name(trainer)
    assert again.keys() == state.keys()
    for name, values in state.items():
        assert all(torch.equal(values[key], again[name][key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    seen = []
    run_step = trainer.run_step

    def watch():
        groups = {name: group for group in trainer.optimizer.param_groups for name in group["param_names"]}
        assert {group["weight_decay"] for group in groups.values()} == {decay}
        seen.append((groups["backbone.0.bias"]["lr"], groups["box_embed.bias"]["lr"]))
        run_step()

    trainer.run_step = watch
    trainer.train()
    assert seen == [tuple(pytest.approx(rate) for rate in pair) for pair in rates]


def state_by_name(trainer):
    optimizer = trainer.optimizer
    pairs = [pair for group in optimizer.param_groups for pair in zip(group["param_names"], group["params"])]
    assert dict(pairs) == dict(trainer.bare_model.named_parameters())
    return {name: {key: x.clone() for key, x in optimizer.state[parameter].items()} for name, parameter in pairs}


def test_other_groups_need_the_names_of_the_parameters(run_training, make_config, tmp_path):
    """Checkpoints of earlier versions lack them."""
    trainer = run_training(*SHORT, "SOLVER.MAX_ITER", 2)
    path = tmp_path / "run" / "model_0000001.pth"
    saved = load(path)
    for group in saved["trainer"]["_trainer"]["optimizer"]["param_groups"]:
        del group["param_names"]
    torch.save(saved, path)
    again = CoDETRTrainer(make_config(*SHORT, "SOLVER.BASE_LR", 0.5, "SOLVER.MAX_ITER", 4))
    again.resume_or_load(True)
    before = state_by_name(trainer)["box_embed.weight"]
    assert torch.equal(state_by_name(again)["box_embed.weight"]["exp_avg"], before["exp_avg"])
    with pytest.raises(InputError, match=r"optimizer does not fit.*no names.*SOLVER\.LR_MULTIPLIERS as they were"):
        run_training(*SHORT, "SOLVER.LR_MULTIPLIERS", "[['backbone', 0.1]]", resume=True)


def test_other_training_data_are_not_resumed(run_training, make_config, coco_json, tmp_path):
    name, folder, path = coco_json[0]
    with open(path) as file:
        data = json.load(file)

    def resume(data, name):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
        datasets = json.dumps([[name, folder, str(tmp_path / f"{name}.json")], coco_json[1]])
        return CoDETRTrainer(make_config(*SHORT, "DATASETS.COCO_JSON", datasets, "DATASETS.TRAIN", f"('{name}',)"))

    resume(data, "resumed_data").train()
    resume(data, "resumed_data").resume_or_load(True)
    data["annotations"][0]["bbox"][2] += 1
    (tmp_path / "resumed_data.json").write_text(json.dumps(data))
    with pytest.raises(
        InputError, match=r"DATASETS\.TRAIN: resumed_data is not what.*\(another annotation file\).*MODEL"
    ):
        resume(data, "resumed_data").resume_or_load(True)
    data["images"].pop()
    data["annotations"] = [x for x in data["annotations"] if x["image_id"] != 13]
    with pytest.raises(InputError, match=r"resumed_data is not what.*\(14 images there, 13 now\)"):
        resume(data, "resumed_data").resume_or_load(True)


def test_a_learning_rate_for_another_batch_is_that_of_this_one(run_training, tmp_path, assert_same_weights):
    """Powers of two, so that no rounding comes in."""
    short = ("SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()")
    run_training(*short, "SOLVER.BASE_LR", 2**-7, "OUTPUT_DIR", tmp_path / "plain")
    trainer = run_training(*short, "SOLVER.BASE_LR", 2**-5, "SOLVER.REFERENCE_BATCH_SIZE", 16)  # the batch is 4
    assert_same_weights(tmp_path / "plain" / "model_final.pth", tmp_path / "run" / "model_final.pth")
    assert trainer.cfg.SOLVER.BASE_LR == 2**-5  # as it was set, to be resumed and evaluated with


def test_epochs_set_the_length_of_the_run(run_training):
    trainer = run_training("SOLVER.MAX_EPOCHS", 1, "SOLVER.STEPS_EPOCHS", "(0.5,)", "DATASETS.TEST", "()")
    assert trainer.iter == 4  # 14 images in batches of 4


def test_an_epoch_counts_repeated_images(make_config):
    def epoch(*opts):
        trainer = CoDETRTrainer(make_config("SOLVER.MAX_EPOCHS", 1, "SOLVER.IMS_PER_BATCH", 1, *opts))
        return trainer.max_iter, trainer.data_loader.batch_sampler

    assert epoch()[0] == 14
    # Every image holds two of the three classes, which are all rarer than this.
    max_iter, stream = epoch(
        "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 2
    )
    assert max_iter == round(sum(stream.repeat_factors.tolist())) > 20


class Oracle(nn.Module):
    """Detects the objects of an annotation file, but for those of some class."""

    def __init__(self, annotation_json, missed_class=None):
        super().__init__()
        self.boxes = defaultdict(list)
        with open(annotation_json) as file:
            for box in json.load(file)["annotations"]:
                if box["category_id"] != missed_class:
                    self.boxes[box["image_id"]].append((box["bbox"], box["category_id"]))

    def forward(self, inputs):
        results = []
        for x in inputs:
            boxes, classes = zip(*self.boxes[x["image_id"]])
            boxes = BoxMode.convert(torch.tensor(boxes), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
            fields = {"pred_classes": torch.tensor(classes), "scores": torch.ones(len(boxes))}
            found = Instances((x["height"], x["width"]), pred_boxes=Boxes(boxes), **fields)
            results.append({"instances": found})
        return results


def test_the_ap_of_an_oracle(make_config, coco_json):
    """Each class counts as much as the others, and a class that is never detected has an AP of 0."""
    annotation_json = coco_json[1][2]
    results = CoDETRTrainer.test(make_config(), Oracle(annotation_json))["bbox"]
    assert results["AP"] == results["AP75"] == results["AP-class1"] == 100
    results = CoDETRTrainer.test(make_config(), Oracle(annotation_json, missed_class=1))["bbox"]
    assert results["AP"] == pytest.approx(200 / 3)
    assert (results["AP-class0"], results["AP-class1"]) == (100, 0)


def test_an_evaluation_of_weights_that_are_not_finite(make_config):
    class Diverged(nn.Module):
        def forward(self, inputs):
            nothing = torch.full((1, 1, 4), math.nan)
            return detections_from_queries(nothing[..., :2], nothing, [(8, 8)], 1)

    with pytest.raises(InputError, match="predictions are not finite.*lower SOLVER.BASE_LR"):
        CoDETRTrainer.test(make_config(), Diverged())


def test_lvis_is_evaluated(make_config, coco_json, tmp_path):
    name, folder, path = coco_json[1]
    with open(path) as file:
        data = json.load(file)
    for image in data["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/{name}/{image.pop('file_name')}"
        image.update(neg_category_ids=[], not_exhaustive_category_ids=[])
    for category in data["categories"]:
        category["frequency"] = "r"
    (tmp_path / "lvis.json").write_text(json.dumps(data))
    DatasetCatalog.register("tiny_lvis", list)
    MetadataCatalog.get("tiny_lvis").set(
        evaluator_type="lvis", json_file=str(tmp_path / "lvis.json"), image_root=os.path.dirname(folder)
    )
    cfg = make_config("DATASETS.TEST", "('tiny_lvis',)")
    results = CoDETRTrainer.test(cfg, Oracle(path))["bbox"]
    assert results["AP"] == results["APr"] == 100 and math.isnan(results["APc"])
    assert (tmp_path / "run" / "inference" / "lvis_instances_results.json").exists()


def test_copy_paste_is_the_same_whatever_process_maps_the_images(run_training, tmp_path):
    jitter = "INPUT.LARGE_SCALE_JITTER"
    opts = [f"{jitter}.ENABLED", True, f"{jitter}.MIN_SCALE", 0.8, f"{jitter}.MAX_SCALE", 1.0]
    opts += ["INPUT.COPY_PASTE.ENABLED", True, "MODEL.CODETR.CANVAS_SIZE", 48, "DATASETS.TEST", "()"]
    first, second = (
        run_training(*opts, "DATALOADER.NUM_WORKERS", n, "OUTPUT_DIR", tmp_path / str(n)).bare_model.state_dict()
        for n in (0, 2)
    )
    for name in first:
        assert torch.equal(first[name], second[name])


def test_a_metric_that_does_not_exist_is_reported_once(run_training, tmp_path):
    run_training("TEST.BEST_CHECKPOINT_METRIC", "segm/AP", "TEST.EVAL_PERIOD", 2)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("'segm/AP'") == 1 and "bbox/AP50" in log
    assert (tmp_path / "run" / "model_final.pth").exists()
    assert not (tmp_path / "run" / "model_best.pth").exists()


def test_metrics_from_an_iteration_on_are_dropped(tmp_path):
    path = tmp_path / "metrics.json"
    lines = [json.dumps({"iteration": i, "loss": 1.0}) for i in (19, 39, 59)]
    path.write_text("\n".join([*lines, '{"iteration": 5']))  # the last line is not whole
    drop_metrics_from(str(path), 40)
    assert path.read_text().splitlines() == lines[:2]
    drop_metrics_from(str(tmp_path / "none.json"), 40)
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_the_precision_of_float32_products_is_set(make_config):
    """An option of detectron2's main branch, which the installed version may lack."""
    before = torch.get_float32_matmul_precision()
    try:
        cfg = make_config()
        cfg.defrost()
        cfg.FLOAT32_PRECISION = ""
        setup(cfg)
        assert torch.get_float32_matmul_precision() == before
        cfg.FLOAT32_PRECISION = "medium"
        setup(cfg)
        assert torch.get_float32_matmul_precision() == "medium"
        cfg.FLOAT32_PRECISION = "low"
        with pytest.raises(InputError, match="FLOAT32_PRECISION is 'low'; it may be: highest, high, medium"):
            check_config(cfg)
    finally:
        torch.set_float32_matmul_precision(before)


def test_metrics_are_json_whatever_their_values(tmp_path):
    path = tmp_path / "metrics.json"
    writer = MetricsWriter(str(path))
    with EventStorage(7) as storage:
        storage.put_scalars(total_loss=2.0)
        storage.put_scalars(**{"bbox/AP-cat": math.nan, "bbox/AP": math.inf}, smoothing_hint=False)
        writer.write()
        writer.write()
        storage.step()
        storage.put_scalars(total_loss=1.0)
        writer.write()

    def no_constant(name):
        raise ValueError(f"{name} is no JSON")

    lines = [json.loads(line, parse_constant=no_constant) for line in path.read_text().splitlines()]
    assert lines == [
        {"iteration": 7, "total_loss": 2.0, "bbox/AP-cat": None, "bbox/AP": None},
        {"iteration": 8, "total_loss": 1.5},  # the median of both
    ]


def test_metrics_on_a_full_disk_end_with_a_whole_line(tmp_path, limit_files):
    path = tmp_path / "metrics.json"
    writer = MetricsWriter(str(path))
    with EventStorage(0) as storage:
        storage.put_scalars(total_loss=2.0)
        writer.write()
        before = path.read_bytes()
        storage.step()
        storage.put_scalars(total_loss=1.0)
        error = pytest.raises(InputError, match="metrics.json: cannot be written: File too large")
        with limit_files(len(before) + 10), error:
            writer.write()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "size, file",
    [(2_000, "log.txt"), (8_000, "config.yaml"), (16_000, "model_0000002.pth"), (None, "run")],
    ids=["log", "config", "checkpoint", "results"],
)
def test_a_full_disk_is_one_line_and_what_is_whole_stays(
    size, file, config_file, tmp_path, capfd, limit_files, monkeypatch
):
    if size is None:
        monkeypatch.setattr(DetectionEvaluator, "evaluate", no_space)
    opts = ["SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 3, "TEST.EVAL_PERIOD", 5]
    with limit_files(size) if size else nullcontext(), pytest.raises(SystemExit) as exit:
        train_net.main(["--config-file", str(config_file), *map(str, opts)])
    output, errors = capfd.readouterr()
    last = errors.strip().splitlines()[-1]
    assert exit.value.code == 2 and last.startswith(f"error: {tmp_path}/run") and f"{file}: " in last
    assert "Traceback" not in output + errors
    whole = "model_0000002.pth" if size is None else None
    left = tmp_path / "run" / "last_checkpoint"
    assert (left.read_text() if left.exists() else None) == whole
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith(".")]


def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_weights_that_diverge_in_the_last_step_are_not_kept(make_config, tmp_path):
    """The loss of that step was finite. The run is not evaluated either."""
    trainer = CoDETRTrainer(make_config("SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 4))
    run_step = trainer.run_step

    def run_step_with_fault():
        run_step()
        if trainer.iter == 3:
            with torch.no_grad():
                trainer.model.class_embed.bias.fill_(math.nan)

    trainer.run_step = run_step_with_fault
    with pytest.raises(InputError, match=r"model_0000003\.pth: not written.*class_embed\.bias.*model_0000001\.pth"):
        trainer.train()
    assert not hasattr(trainer, "_last_eval_results")
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not (tmp_path / "run" / "model_final.pth").exists()


def test_unknown_evaluators_are_named(make_config):
    from detectron2.data import MetadataCatalog

    MetadataCatalog.get("tiny_odd").set(evaluator_type="panoptic")
    with pytest.raises(InputError, match="tiny_odd.*'panoptic'"):
        CoDETRTrainer.build_evaluator(make_config(), "tiny_odd")


def test_training_starts_from_the_average_of_another_run(run_training, make_config, tmp_path):
    run_training("SOLVER.EMA.ENABLED", True, "DATASETS.TEST", "()")
    path = tmp_path / "run" / "model_0000005.pth"
    cfg = make_config("MODEL.WEIGHTS", path, "OUTPUT_DIR", tmp_path / "next", "SOLVER.EMA.ENABLED", True)
    trainer = CoDETRTrainer(cfg)
    trainer.resume_or_load(False)
    average = load(path)["ema"]["box_embed.weight"]
    assert torch.equal(trainer.model.box_embed.weight, average)
    assert torch.equal(trainer.ema.state_dict()["box_embed.weight"], average)
    assert isinstance(trainer.checkpointer, CoDETRCheckpointer)


def test_weights_of_other_classes_start_a_training_and_no_evaluation(make_config, tmp_path, monkeypatch):
    def classifier(num_classes):
        model = nn.ModuleDict({"class_embed": nn.Linear(2, num_classes)})
        model.class_rows = lambda: {"class_embed": ClassRows()}
        return model

    def bias(model):
        return model["class_embed"].bias

    weights, path = classifier(2), tmp_path / "weights.pth"
    torch.save(weights.state_dict(), path)
    MetadataCatalog.get("trainer_other").thing_classes = ["Class2", "something"]
    try:
        cfg = make_config("MODEL.WEIGHTS", path, "MODEL.CODETR.REUSE_CLASSES", "trainer_other")
        trainer = CoDETRTrainer(cfg)
        trainer.checkpointer.model = model = classifier(3)
        fresh = bias(model).detach().clone()
        trainer.resume_or_load(False)
        assert torch.equal(bias(model)[:2], fresh[:2]) and bias(model)[2] == bias(weights)[0]
        monkeypatch.setattr(CoDETRTrainer, "build_model", lambda cfg: classifier(3))
        with pytest.raises(InputError, match="has 2 classes, but MODEL.CODETR.NUM_CLASSES is 3"):
            evaluate(cfg)
    finally:
        MetadataCatalog.pop("trainer_other")
