"""Dense bf16 peaks and memory of GPUs, from their data sheets."""

from dataclasses import dataclass

from shared.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    name: str
    """Part of the name that the driver reports."""
    peak_flops: float
    """Dense bf16, in FLOP/s."""
    memory_gib: float
    """What the driver leaves for programs."""


# A name that is part of another one comes after it.
GPUS = (
    Gpu(name="H100 PCIe", peak_flops=756e12, memory_gib=79.1),
    Gpu(name="H100 NVL", peak_flops=835e12, memory_gib=93.1),
    Gpu(name="GH200", peak_flops=989e12, memory_gib=94.5),
    Gpu(name="H100", peak_flops=989e12, memory_gib=79.1),
    Gpu(name="H200", peak_flops=989e12, memory_gib=139.8),
    # One of its two GPUs, which has a higher power limit than a B200.
    Gpu(name="GB200", peak_flops=2500e12, memory_gib=178.4),
    Gpu(name="B200", peak_flops=2250e12, memory_gib=178.4),
    Gpu(name="A100 40GB", peak_flops=312e12, memory_gib=39.4),
    Gpu(name="A100", peak_flops=312e12, memory_gib=79.1),
    Gpu(name="L40S", peak_flops=362e12, memory_gib=44.4),
)


def gpu_named(name: str) -> Gpu:
    """Return the GPU called `name`, in upper or lower case. Raises ConfigError for an unknown
    one."""
    for gpu in GPUS:
        if gpu.name.lower() == name.lower():
            return gpu
    raise ConfigError(f"--gpu {name}: not known; known are {', '.join(gpu.name for gpu in GPUS)}")


def find_gpu(device_name: str) -> Gpu | None:
    """Return the first GPU whose name is part of `device_name`, such as "NVIDIA H100 80GB HBM3", or
    None."""
    return next((gpu for gpu in GPUS if gpu.name in device_name), None)
