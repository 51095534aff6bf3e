"""Put the second device into this process: device.cpp below torch, and its Python side in
`torch.cuda`.

From then on torch has a GPU. This cannot be undone, so only programs that tests start call it.
"""

import contextlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

MEMORY = 80 << 30
NAME = "second device of the tests"


def install(built: Path) -> ModuleType:
    """Load the module that device_build.py compiled and return it."""
    from device_build import MODULE

    spec = importlib.util.spec_from_file_location(MODULE, built)
    assert spec is not None
    assert spec.loader is not None
    device = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(device)
    _fill_torch_cuda(device)
    _let_gloo_stand_for_nccl()
    torch.serialization.register_package(5, _location_of, _load_onto_device)
    return device


def _fill_torch_cuda(device: ModuleType) -> None:
    cuda, generator = torch.cuda, device.default_generator()
    index = int(os.environ.get("LOCAL_RANK", "0"))
    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, total_memory=MEMORY, multi_processor_count=132, warp_size=32
    )
    one = _stream_class(device)()
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "_is_in_bad_fork": False,
        "device_count": int(os.environ.get("LOCAL_WORLD_SIZE", index + 1)),
        "current_device": index,
        "get_device_name": NAME,
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
        "memory_stats": {},
        "current_stream": one,
        "default_stream": one,
        **dict.fromkeys(("_lazy_init", "set_stream", "empty_cache", "ipc_collect")),
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, _answer=answer, **__: _answer)
    # Creating a tensor there refuses the device of another rank.
    cuda.set_device = lambda index: torch.empty(0, device=_indexed(index))
    cuda.synchronize = lambda *_: device.host_waits("torch.cuda.synchronize")
    cuda.memory_allocated = cuda.memory_reserved = lambda *_: device.live_bytes()
    cuda.max_memory_allocated = cuda.max_memory_reserved = lambda *_: device.peak_bytes()
    cuda.reset_peak_memory_stats = cuda.reset_max_memory_allocated = lambda *_: device.reset_peak()
    cuda.mem_get_info = lambda *_: (MEMORY - device.live_bytes(), MEMORY)
    cuda.default_generators = (generator,) * (index + 1)
    cuda.manual_seed = cuda.manual_seed_all = cuda.random.manual_seed_all = generator.manual_seed
    cuda.initial_seed = generator.initial_seed
    cuda.get_rng_state = lambda *_: generator.get_state()
    cuda.set_rng_state = lambda state, *_: generator.set_state(state)
    cuda.Stream = cuda.streams.Stream = type(one)
    cuda.Event = cuda.streams.Event = _event_class(device)
    cuda.stream = cuda.device = lambda *_: contextlib.nullcontext()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None
    cuda._initialized = True
    torch._C._cuda_getCurrentRawStream = lambda *_: 0
    torch.Tensor.record_stream = lambda *_: None


def _indexed(device: Any) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _stream_class(device: ModuleType) -> type:
    class Stream:
        """Work is done as soon as it is submitted, so nothing waits."""

        priority = cuda_stream = stream_id = device_index = 0

        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> "Stream":
            return self

        def __exit__(self, *_: Any) -> None: ...
        def wait_stream(self, _: Any) -> None: ...
        def wait_event(self, _: Any) -> None: ...
        def record_event(self, event: Any = None) -> Any:
            return event or torch.cuda.Event()

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            device.host_waits("Stream.synchronize")

    return Stream


def _event_class(device: ModuleType) -> type:
    class Event:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def record(self, _: Any = None) -> None: ...
        def wait(self, _: Any = None) -> None: ...
        def query(self) -> bool:
            return True

        def elapsed_time(self, _: Any) -> float:
            return 1.0

        def synchronize(self) -> None:
            device.host_waits("Event.synchronize")

    return Event


def _let_gloo_stand_for_nccl() -> None:
    original = dist.init_process_group

    def init_process_group(backend: str | None = None, *arguments: Any, **options: Any) -> None:
        options.pop("device_id", None)
        original("gloo" if backend in (None, "nccl") else backend, *arguments, **options)

    dist.init_process_group = dist.distributed_c10d.init_process_group = init_process_group
    dist.is_nccl_available = dist.distributed_c10d.is_nccl_available = lambda: True


def _location_of(storage: Any) -> str | None:
    return str(storage.device) if storage.device.type == "cuda" else None


def _load_onto_device(storage: Any, location: str) -> Any:
    """Load a storage for torch.load. Rank 0 refuses a checkpoint of rank 1 without map_location."""
    if not location.startswith("cuda"):
        return None
    loaded = torch.empty(storage.nbytes(), dtype=torch.uint8, device=location)
    loaded.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
    return loaded.untyped_storage()
