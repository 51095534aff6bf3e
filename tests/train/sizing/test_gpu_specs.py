"""Names of GPUs, as drivers report them and as people write them, lead to their specifications."""

import pytest

from shared.errors import ConfigError
from train.sizing.gpu_specs import GPUS, Gpu, find_gpu, gpu_named


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_no_name_hides_a_longer_one(gpu: Gpu) -> None:
    assert find_gpu(f"NVIDIA {gpu.name} 123GB") == gpu
    assert gpu_named(gpu.name.lower()) == gpu_named(gpu.name.upper()) == gpu


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_a_name_from_a_driver_is_found(device: str, name: str) -> None:
    gpu = find_gpu(device)
    assert gpu is not None
    assert gpu.name == name


def test_an_unknown_gpu_is_none_or_an_error_that_lists_the_known() -> None:
    assert find_gpu("Tesla V100-SXM2-32GB") is None
    with pytest.raises(ConfigError, match=r"--gpu V100: not known; known are H100 PCIe, .*L40S"):
        gpu_named("V100")
