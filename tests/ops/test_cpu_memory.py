"""Each test has a process of its own: what frees memory is decided once for a process."""

import subprocess
import sys

START = """
import gc, os, torch
from codetr_d2.ops import keep_freed_memory
keep_freed_memory()
keep_freed_memory()
MIB = 1 << 20

def statistics():
    return [x / MIB for x in torch.ops.codetr_d2._kept_memory()]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB

def tensor(mib):
    return torch.ones(int(mib * MIB), dtype=torch.uint8)
"""


def run(code):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", START + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_freed_block_serves_the_next_tensor_of_its_size():
    run("""
x, held = tensor(8), tensor(20)
address = x.data_ptr()
del x
assert statistics() == [8, 20, 28]
x = tensor(7.5)                              # wastes little
assert x.data_ptr() == address and x[::4096].eq(1).all() and statistics() == [0, 28, 28]
del x
x = tensor(5)                                # would waste more than half of what it needs
assert statistics() == [8, 25, 28]
y = tensor(3)                                # there is no room for both beside the others
assert statistics() == [0, 28, 28]
small = tensor(0.5)                          # left to the C library
assert statistics() == [0, 28, 28]
""")


def test_the_process_grows_little_past_the_worst_moment():
    run("""
before = resident()
x = tensor(64)
del x
for size in range(2, 64):                    # 2 GiB in all, no two of a size
    tensor(size)
    waiting, used, peak = statistics()
    assert waiting + used <= 1.25 * peak and peak == 64
assert resident() - before < 80 + 16
together = [tensor(40) for _ in range(3)]    # a worse moment
assert statistics() == [0, 120, 120]
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
