"""Compile device.cpp once, for all workers of a test run and for later runs with the same torch."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("device.cpp")
MODULE = "second_device_native"


def why_not() -> str | None:
    """Return why the device cannot be built here, None if it can."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        return (
            "this torch has a GPU backend, and the second device takes the place of one in CPU"
            " builds only"
        )
    return None if shutil.which("g++") else "needs a C++ compiler: no g++ on the PATH"


def build(cache: Path) -> Path:
    """Return the compiled module; `cache` may hold it from the same source and the same torch."""
    version = hashlib.sha256(
        f"{torch.__version__} {sysconfig.get_config_var('SOABI')}".encode() + SOURCE.read_bytes()
    )
    built = cache / f"{MODULE}-{version.hexdigest()[:16]}.so"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            for older in cache.glob(f"{MODULE}-*.so"):
                older.unlink()
            unfinished = built.with_suffix(".tmp")
            done = subprocess.run(_command(unfinished), capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(
                    f"{SOURCE.name} does not compile for torch"
                    f" {torch.__version__}:\n{done.stderr[-3000:]}"
                )
            os.replace(unfinished, built)
    return built


def _command(output: Path) -> list[str]:
    """Compile without optimisation, which takes four times as long: torch's kernels do the work."""
    root = Path(torch.__file__).parent
    headers = [
        root / "include",
        root / "include/torch/csrc/api/include",
        sysconfig.get_path("include"),
    ]
    return [
        *("g++", "-O0", "-g0", "-w", "-shared", "-fPIC", "-std=c++20"),
        f"-DTORCH_EXTENSION_NAME={MODULE}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{folder}" for folder in headers),
        *(str(SOURCE), "-o", str(output), f"-L{root / 'lib'}"),
        *("-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"),
    ]
