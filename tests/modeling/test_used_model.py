"""A model that has been used is as good as a new one: no state is left behind but its weights."""

import copy
import io
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from codetr_d2.modeling.query_heads import QUERY_HEAD_REGISTRY
from codetr_d2.ops import cpu_memory
from tests.small_model import build, make_batch, train_step

every_head = pytest.mark.parametrize("query_head", [name for name, _ in QUERY_HEAD_REGISTRY])


def detect(model, batch) -> list[torch.Tensor]:
    model.eval()
    with torch.no_grad():
        found = [x["instances"] for x in model(batch)]
    return [torch.cat((x.pred_boxes.tensor, x.scores[:, None], x.pred_classes[:, None]), dim=1) for x in found]


def assert_equal(ours, expected):
    assert len(ours) == len(expected)
    for x, y in zip(ours, expected):
        assert torch.equal(x, y)


@every_head
def test_trains_after_inference_mode(query_head):
    """At the same size: tensors of inference mode must not be met again by autograd."""
    model = build("MODEL.CODETR.QUERY_HEAD", query_head)
    batch = make_batch(2, 1)
    expected = train_step(copy.deepcopy(model), batch)
    with torch.inference_mode():
        model.eval()(batch)
    losses = train_step(model, batch)
    for name, value in losses.items():
        assert torch.equal(value, expected[name]), name


@every_head
def test_copies_of_a_used_model(query_head):
    model = build("MODEL.CODETR.QUERY_HEAD", query_head)
    batch = make_batch(2, 1)
    train_step(model, batch)
    expected = detect(model, batch)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    with torch.no_grad():
        for p in model.parameters():  # they share nothing with it
            p.zero_()
    for other in copies:
        assert_equal(detect(other, batch), expected)
        assert all(torch.isfinite(x) for x in train_step(other, batch).values())


@every_head
def test_threads(query_head):
    """One model that several threads ask at once, for images of several sizes."""
    model = build("MODEL.CODETR.QUERY_HEAD", query_head).eval()
    batches = [make_batch(1), make_batch(1, 1), make_batch(1, 1, 1)] * 3
    expected = [detect(model, batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(lambda batch: detect(model, batch), batches), expected):
            assert_equal(ours, theirs)


@every_head
def test_raw_predictions_are_those_of_inference(query_head):
    model = build("MODEL.CODETR.QUERY_HEAD", query_head).eval()
    batch = make_batch(0)
    with torch.no_grad():
        logits, boxes = model.raw_predictions(model.preprocess(batch).tensor)
        [found] = model(batch)
    found = found["instances"]
    assert torch.equal(found.scores, logits[0].sigmoid().flatten().topk(len(found)).values)
    height, width = batch[0]["image"].shape[-2:]
    centre = boxes[0, logits[0].amax(1).argmax(), :2] * torch.tensor([width, height])
    best = found.pred_boxes.tensor[0]
    assert (best[:2] <= centre).all() and (centre <= best[2:]).all()


class _Core(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model.raw_predictions(images)


@pytest.mark.slow
@pytest.mark.parametrize(
    "query_head, backend",
    [*itertools.product(["CoDeformableDETRHead", "CoDINOHead"], ["auto", "eager"])]
    + [(name, "auto") for name in ("ConditionalDETRHead", "DABDETRHead")],
)
def test_export_of_the_whole_model(query_head, backend):
    """torch.export at one size of images: nothing reads a number from a tensor."""
    model = build("MODEL.CODETR.QUERY_HEAD", query_head, "MODEL.MS_DEFORM_ATTN", backend).eval()
    core = _Core(model).eval()
    with torch.no_grad():
        # Not strict is the default of newer versions of torch.
        program = torch.export.export(core, (torch.randn(1, 3, 96, 128),), strict=False)
        images = torch.randn(1, 3, 96, 128)
        for ours, expected in zip(program.module()(images), core(images)):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_second_model_leaves_the_first_alone(monkeypatch):
    """The backend of deformable attention is each model's own, and no model chooses how the process keeps memory."""
    monkeypatch.setattr(cpu_memory, "library_is_loaded", lambda: pytest.fail("a model called keep_freed_memory"))
    first, batch = build(), make_batch(1)
    before = detect(first, batch)
    second = build("MODEL.MS_DEFORM_ATTN", "eager")
    second.load_state_dict(first.state_dict())
    attentions = [[x.backend for x in m.modules() if hasattr(x, "sampling_offsets")] for m in (first, second)]
    assert set(attentions[0]) == {"auto"} and set(attentions[1]) == {"eager"}
    assert_equal(detect(first, batch), before)
    for ours, expected in zip(detect(second, batch), before):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
