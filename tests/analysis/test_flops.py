"""FLOPs that are counted without computing, against those of a run."""

import copy

import pytest
import torch

from codetr_d2.analysis.cost import measure_cost
from codetr_d2.analysis.flops import detection_flops
from tests.small_model import build

SIZE = (64, 90)  # padded to another width


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("MODEL.CODETR.QUERY_HEAD", "CoDINOHead"),
        ("MODEL.CODETR.QUERY_HEAD", "DABDETRHead", "MODEL.CODETR.CANVAS_SIZE", 128),
        ("MODEL.CODETR.COMPILE", True),
    ],
)
def test_nothing_computed_gives_the_flops_of_a_run(options):
    model = build(*options)
    counted = detection_flops(model, SIZE)
    if model.is_compiled:
        model = build()
    assert counted == measure_cost(model.eval(), SIZE, repeat=1).total.flops > 1e6


def test_the_model_and_the_random_generators_stay_as_they_are():
    model = build("MODEL.CODETR.DECODER.DROPOUT", 0.5).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    memory = {name: x.data_ptr() for name, x in model.state_dict().items()}
    detection_flops(model, SIZE)
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert {name: x.data_ptr() for name, x in after.items()} == memory
    assert all(type(x) is type(y) for x, y in zip(model.parameters(), build().parameters()))
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
