"""Each test has a process of its own: what frees memory is decided once for a process."""

import subprocess
import sys

import pytest

from tests.ops.common import needs_cpp

pytestmark = [pytest.mark.slow, needs_cpp]

START = """
import gc, os, torch
from codetr_d2.ops import keep_freed_memory
keep_freed_memory()
keep_freed_memory()
MIB = 1 << 20

def statistics():
    return [x / MIB for x in torch.ops.codetr_d2._kept_memory()]

def resident():                              # without the pages of files, of which code takes more as it runs
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def tensor(mib):
    return torch.ones(int(mib * MIB), dtype=torch.uint8)
"""


def run(code):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", START + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_freed_memory_serves_the_next_tensors():
    run("""
x, held = tensor(8), tensor(20)
address = x.data_ptr()
del x
assert statistics() == [8, 20, 28]
x = tensor(5)                                # the smallest kept range that holds it
assert x.data_ptr() == address and statistics() == [3, 25, 28]
y = tensor(3)                                # and what is left of that
assert y.data_ptr() == address + 5 * MIB and statistics() == [0, 28, 28]
del x, y
z = tensor(8)                                # neighbours are joined again
assert z.data_ptr() == address and statistics() == [0, 28, 28]
assert z[::4096].eq(1).all() and held[::4096].eq(1).all()
odd = tensor(1.5)                            # fresh memory comes in multiples of 2 MiB
assert statistics() == [0.5, 29.5, 29.5]
small = tensor(0.5)                          # left to the C library
assert statistics() == [0.5, 29.5, 29.5]
""")


def test_the_process_grows_little_past_the_worst_moment():
    run("""
before = resident()
held = [tensor(2) for _ in range(64)]
del held[::2]                                # gaps that hold nothing larger than 2 MiB
for size in range(3, 64):                    # 2 GiB in all
    x = tensor(size)
    assert x[::4096].eq(1).all()
    del x
    kept, used, peak = statistics()
    assert kept + used <= 1.25 * peak and peak == 128
    assert resident() - before < kept + used + 16
assert all(x.eq(1).all() for x in held)
together = [tensor(48) for _ in range(3)]    # a worse moment
assert statistics()[1:] == [64 + 144, 64 + 144]
""")


def test_regions_of_more_than_a_gigabyte():
    run("""
x = torch.empty(3 << 30, dtype=torch.uint8)  # never touched: no memory
x[-1] = 1
y = tensor(100)
x[-200 * MIB:] = 2
assert y.eq(1).all() and x[-1] == 2
""")


def test_random_sizes_never_overlap():
    run("""
import random
random.seed(0)
live = []
for step in range(4000):
    if live and (len(live) > 40 or random.random() < 0.5):
        value, x = live.pop(random.randrange(len(live)))
        assert x[0] == value and x[-1] == value and x[len(x) // 2] == value
    else:
        x = torch.empty(random.randrange(MIB, 12 * MIB), dtype=torch.uint8)
        value = step % 251
        x[0] = x[-1] = x[len(x) // 2] = value
        live.append((value, x))
assert statistics()[1] >= sum(len(x) for _, x in live) / MIB
del live[:], x
assert statistics()[1] == 0
""")


def test_any_operator_works_with_it():
    run("""
torch.manual_seed(0)
x = torch.randn(1, 3, 512, 512).contiguous(memory_format=torch.channels_last)
weight = torch.randn(32, 3, 3, 3, requires_grad=True)
y = torch.nn.functional.conv2d(x, weight, padding=1)
y.square().sum().backward()
expected = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
y.data.resize_(2 * y.numel())
torch.zeros(1 << 22).numpy().sum()
with torch.autocast("cpu", torch.bfloat16):
    torch.randn(2048, 1024) @ torch.randn(1024, 2048)
""")


def test_threads_and_forks():
    run("""
import threading
def work():
    for i in range(200):
        tensor(1 + i % 7).sum()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for _ in range(5):                           # as the loader's workers start while others compute
    child = os.fork()
    if child == 0:
        tensor(3).sum()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
for thread in threads:
    thread.join()
gc.collect()
assert statistics()[1] == 0
""")
