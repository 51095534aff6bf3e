"""The process group, and the few messages between ranks that are not gradients."""

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from train.engine.launcher_env import launched, read_launcher_env, single_process_env


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """The ranks of a run, and which of them this process is."""

    rank: int
    world_size: int
    device: torch.device
    control_group: dist.ProcessGroup | None
    """A gloo group for small CPU messages that must not wait for the GPU; None for one rank."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def process_group(timeout: timedelta = timedelta(minutes=60)) -> Iterator[Ranks]:
    """Join the process group of the launcher, or one of a single process, and leave it at the end.

    A rank that waits for another longer than `timeout` fails.
    """
    with contextlib.nullcontext() if launched() else single_process_env():
        env = read_launcher_env()
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", env.local_rank)
            torch.cuda.set_device(device)
        _init_deepspeed(device.type, timeout)
        control_group = None
        if env.world_size > 1:
            control_group = dist.new_group(backend="gloo", timeout=timeout)
        try:
            yield Ranks(
                rank=env.rank,
                world_size=env.world_size,
                device=device,
                control_group=control_group,
            )
        finally:
            importlib.import_module("deepspeed.comm").destroy_process_group()


def barrier(ranks: Ranks) -> None:
    """Wait until every rank has reached this call."""
    if ranks.control_group is not None:
        dist.barrier(ranks.control_group)


def any_rank(flag: bool, ranks: Ranks) -> bool:
    """Return on all ranks whether `flag` is true on any of them. Never waits for the GPU."""
    if ranks.control_group is None:
        return flag
    tensor = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=ranks.control_group)
    return bool(tensor.item())


def sum_over_ranks(values: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Add up `values` over all ranks, in place, on their device."""
    if ranks.world_size > 1:
        dist.all_reduce(values)
    return values


def gather_to_main(value: object, ranks: Ranks) -> list[object]:
    """Return every rank's `value` on rank 0, in rank order; an empty list elsewhere."""
    if ranks.control_group is None:
        return [value]
    gathered: list[object] | None = [None] * ranks.world_size if ranks.is_main else None
    dist.gather_object(value, gathered, dst=0, group=ranks.control_group)
    return gathered or []


def broadcast_from_main(value: object, ranks: Ranks) -> object:
    """Return rank 0's `value` on every rank."""
    if ranks.control_group is None:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0, group=ranks.control_group)
    return holder[0]


def _init_deepspeed(device_type: str, timeout: timedelta) -> None:
    # Without it, DeepSpeed searches for an accelerator, and warns if there is none.
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    import deepspeed

    # DeepSpeed calls these by their old names in every step.
    for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
        warnings.filterwarnings("ignore", message=f".*{name}.*deprecated", category=FutureWarning)
    # DeepSpeed would compile a shared-memory kernel, and fail without a compiler. A plain `import
    # ... as` of this module resolves to torch's and would patch nothing.
    comm: Any = importlib.import_module("deepspeed.comm.torch")
    comm.build_shm_op = lambda: None
    backend = "nccl" if device_type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
