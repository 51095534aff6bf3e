"""The second device refuses what a GPU refuses, reports exactly the waits, and counts bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path
import torch
from device_install import install

device = install(Path(sys.argv[1]))
local = torch.arange(12.0).reshape(3, 4)
remote = local.to("cuda")
assert remote.is_cuda and str(remote.device) == "cuda:1", remote.device  # LOCAL_RANK is 1

def refused(action):
    try:
        action()
    except RuntimeError as exc:
        return str(exc)
    raise AssertionError("was not refused")

for action in (
    lambda: remote + local,
    lambda: remote @ local.t(),
    lambda: torch.cat([remote, local]),
    lambda: torch.nn.functional.embedding(torch.tensor([1]), remote),
    lambda: torch.mm(remote, remote.t(), out=torch.empty(3, 3)),
    lambda: local.clone().add_(remote),
):
    assert "same device" in refused(action), action
assert "this rank's device is cuda:1" in refused(lambda: torch.empty(1, device="cuda:0"))
assert "cuda:0" in refused(lambda: torch.cuda.set_device(0))
leaf = torch.nn.Parameter(local.clone())
assert "cuda" in refused(lambda: setattr(leaf, "grad", remote))

waits = []
device.watch(waits.append)

def waits_of(action):
    waits.clear()
    action()
    return len(waits)

mask = remote > 3
pinned = local.pin_memory()
for action in (
    lambda: remote.sum().item(),
    lambda: remote.tolist(),
    lambda: bool(mask.any()),
    lambda: remote.cpu(),
    lambda: local.to("cuda"),
    lambda: torch.tensor([1.0], device="cuda"),
    lambda: remote.nonzero(),
    lambda: torch.equal(remote, remote),
    torch.cuda.synchronize,
):
    assert waits_of(action) == 1, (action, waits)
for action in (lambda: remote[mask], lambda: remote[torch.tensor([0])]):
    assert waits_of(action) >= 1, action
index = torch.zeros(1, dtype=torch.int64).pin_memory()
for action in (
    lambda: remote * 2 + 1,
    lambda: remote @ remote.t(),
    lambda: pinned.to("cuda", non_blocking=True),
    lambda: remote.masked_fill(mask, 0.0),
    lambda: remote.index_select(0, index.to("cuda", non_blocking=True)),
    lambda: torch.full((), 3.0, device="cuda"),
    lambda: remote.clone()[0].fill_(1.0),
):
    assert waits_of(action) == 0, (action, waits)
device.watch(None)

before = device.live_bytes()
device.reset_peak()
made = remote.repeat(100, 1)  # 4,800 bytes, ten blocks of 512
assert device.live_bytes() - before == 5120, device.live_bytes() - before
part = made[:10]
del made
assert device.live_bytes() - before == 5120  # a view keeps all of it
del part
assert device.live_bytes() == before
assert device.peak_bytes() - before == 5120

generator = torch.cuda.get_rng_state()
first = torch.rand(3, device="cuda")
torch.cuda.set_rng_state(generator)
assert torch.equal(first, torch.rand(3, device="cuda"))
assert "generator" in refused(lambda: torch.rand(3, device="cuda", generator=torch.Generator()))
print("as a GPU")
"""


@pytest.mark.slow
def test_the_device_behaves_like_a_gpu(second_device: Path) -> None:
    """In a separate process, as the second rank of a machine."""
    environment = {**os.environ, "LOCAL_RANK": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(second_device)],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment,
    )
    assert done.stdout == "as a GPU\n", done.stderr[-3000:]
