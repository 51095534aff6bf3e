"""What is known of GPUs: dense bf16 peaks and memory, from their makers' data sheets."""

from dataclasses import dataclass

from shared.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    name: str
    """Part of the device's name as the driver says it."""
    peak_flops: float
    """Dense bf16, in FLOP/s."""
    memory_gib: float
    """What the driver leaves to programs."""


# a name that is part of another one stands behind it
GPUS = (
    Gpu(name="H100 PCIe", peak_flops=756e12, memory_gib=79.1),
    Gpu(name="H100 NVL", peak_flops=835e12, memory_gib=93.1),
    Gpu(name="GH200", peak_flops=989e12, memory_gib=94.5),
    Gpu(name="H100", peak_flops=989e12, memory_gib=79.1),
    Gpu(name="H200", peak_flops=989e12, memory_gib=139.8),
    Gpu(
        name="GB200", peak_flops=2500e12, memory_gib=178.4
    ),  # one of its two; runs at more watts than a B200
    Gpu(name="B200", peak_flops=2250e12, memory_gib=178.4),
    Gpu(name="A100 40GB", peak_flops=312e12, memory_gib=39.4),
    Gpu(name="A100", peak_flops=312e12, memory_gib=79.1),
    Gpu(name="L40S", peak_flops=362e12, memory_gib=44.4),
)


def gpu_named(name: str) -> Gpu:
    """Return the GPU that `name` is, in any case of letters. Raises ConfigError for one that is not
    known."""
    for gpu in GPUS:
        if gpu.name.lower() == name.lower():
            return gpu
    raise ConfigError(f"--gpu {name}: not known; known are {', '.join(gpu.name for gpu in GPUS)}")


def find_gpu(device_name: str) -> Gpu | None:
    """Return the GPU whose name is part of `device_name`, as in "NVIDIA H100 80GB HBM3"; None if
    none is."""
    return next((gpu for gpu in GPUS if gpu.name in device_name), None)
