"""The memory that the loss adds to the peak of a process: a fraction of what all logits at once
would add."""

import os
import subprocess
import sys

import pytest
from repository import ROOT

PROGRAM = """
import sys, torch
from train.model.loss import chunked_cross_entropy

def full(hidden, head, targets, weights):
    losses = torch.nn.functional.cross_entropy(hidden @ head.t(), targets, reduction="none")
    return (losses * weights).sum()

def peak():
    # In KiB. The peak of getrusage begins with that of the parent.
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0])

rows, size, vocab = 4096, 512, 32000
hidden = torch.randn(rows, size, requires_grad=True)
head = torch.randn(vocab, size, requires_grad=True)
targets, weights = torch.randint(0, vocab, (rows,)), torch.full((rows,), 1 / rows)
function = {"chunked": chunked_cross_entropy, "full": full}[sys.argv[1]]
small = hidden.detach()[:64].requires_grad_()
if sys.argv[1] == "chunked":
    function = lambda *arguments: chunked_cross_entropy(*arguments, torch.empty(len(arguments[0])))
# A small call first, which loads the kernels.
function(small, head.detach()[:512].requires_grad_(), targets[:64] % 512, weights[:64]).backward()
before = peak()
function(hidden, head, targets, weights).backward()
print(peak() - before)
"""


def added_kib(function: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, function],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
def test_the_loss_adds_a_fifth_of_what_full_logits_add() -> None:
    """4,096 rows of 512 through a vocabulary of 32,000: forward and backward."""
    full = added_kib("full")
    assert full > 2 * 4 * 4096 * 32000 / 1024, "logits and their gradient should show"
    assert added_kib("chunked") <= 0.2 * full
