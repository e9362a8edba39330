import logging
from pathlib import Path

import pytest
import torch

from codetr_d2.ops import bfloat16, fast_bfloat16, inference_dtype

XEON_2021 = "processor\t: 0\nflags\t\t: fpu sse avx512f avx512_bf16 avx512_vnni\n"
XEON_2023 = "processor\t: 0\nflags\t\t: fpu sse avx512f avx512_bf16 amx_bf16 avx512_fp16 amx_tile amx_int8\n"


@pytest.fixture(autouse=True)
def nothing_kept():
    """As in a new process; and the answers here are the processor's, not those that other tests get."""
    bfloat16._cpu_has_amx.cache_clear()
    bfloat16._warn_of_slow_bfloat16.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bfloat16, "fast_bfloat16", fast_bfloat16)
        yield
    bfloat16._cpu_has_amx.cache_clear()
    bfloat16._warn_of_slow_bfloat16.cache_clear()


@pytest.mark.parametrize("text, expected", [(XEON_2023, True), (XEON_2021, False), (None, False)])
def test_a_cpu_needs_amx(text, expected, monkeypatch):
    def read_text(path):
        if text is None:  # another system than Linux
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read_text)
    assert fast_bfloat16("cpu") == (expected, f"this CPU has {'' if expected else 'no '}AMX")
    assert inference_dtype(None, torch.device("cpu")) == (torch.bfloat16 if expected else torch.float32)


def test_this_cpu_is_what_torch_says_of_it():
    is_supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    if is_supported is None:
        pytest.skip("this PyTorch doesn't tell")
    assert fast_bfloat16("cpu")[0] == is_supported()


@pytest.mark.parametrize("capability, expected", [((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)])
def test_a_gpu_needs_compute_capability_8(capability, expected, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability)
    assert fast_bfloat16("cuda:1")[0] is expected
    assert asked == [torch.device("cuda:1")]


def test_other_devices_stay_in_float32():
    assert inference_dtype(None, torch.device("mps")) == torch.float32


@pytest.mark.parametrize("is_fast", [True, False])
def test_what_is_wanted_is_taken_and_slowness_said_once(is_fast, monkeypatch, caplog):
    monkeypatch.setattr(bfloat16, "_cpu_has_amx", lambda: is_fast)
    cpu = torch.device("cpu")
    with caplog.at_level(logging.WARNING, "codetr_d2.ops.bfloat16"):
        assert inference_dtype(torch.float32, cpu) == torch.float32
        assert not caplog.records
        assert [inference_dtype(torch.bfloat16, cpu) for _ in range(2)] == [torch.bfloat16] * 2
    said = [x.getMessage() for x in caplog.records]
    assert len(said) == (0 if is_fast else 1)
    assert all(x.endswith("on cpu (this CPU has no AMX); auto takes the faster one") for x in said)
