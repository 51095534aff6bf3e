"""Run `sft-train` commands in this process, on the second device or on the CPU, and record results,
waits and bytes.

Arguments: the compiled module or "cpu", a JSON file of commands (lists of arguments), a JSON file
for the results. The ranks of a run are started as by a launcher, with RANK, WORLD_SIZE and so on;
command i takes the i-th of the ports in SECOND_DEVICE_PORTS.
"""

import gc
import json
import os
import sys
import threading
import traceback
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

PRODUCT = Path(__file__).parents[2] / "train"


def main(built: str, commands_file: str, results_file: str) -> None:
    torch.set_num_threads(1)
    device = None
    if built != "cpu":
        from device_install import install
        from device_kernels import register

        device = install(Path(built))
        library = register(device)
        assert library is not None
    from click.testing import CliRunner

    from train.cli.main import cli

    ports = os.environ.get("SECOND_DEVICE_PORTS", "").split()
    results = []
    for number, arguments in enumerate(json.loads(Path(commands_file).read_text())):
        if ports:
            os.environ["MASTER_PORT"] = ports[number]
        # The loop of the previous command froze its objects.
        gc.unfreeze()
        gc.collect()
        waits = _watch(device)
        base = _memory(device, reset=True)
        result = CliRunner().invoke(cli, arguments)
        memory = _memory(device)
        problem = result.exception if not isinstance(result.exception, SystemExit) else None
        results.append(
            {
                "exit_code": result.exit_code,
                "output": result.output,
                "problem": "".join(traceback.format_exception(problem)) if problem else None,
                "waits": sorted([*wait, times] for wait, times in waits.items()),
                "live_bytes": base["live"],
                "peak_bytes": memory["peak"],
            }
        )
        Path(results_file).write_text(json.dumps(results))


def _watch(device: ModuleType | None) -> Counter[tuple[str, str, str]]:
    """Return a counter of waits that grows: (kind, function of the product that led to it, function
    that waited).

    Only waits inside the training loop count, and none of Triton's interpreter, which copies
    operands to the host.
    """
    waits: Counter[tuple[str, str, str]] = Counter()
    if device is not None:
        device.watch(lambda kind: _note(waits, kind))
    return waits


def _note(waits: Counter[tuple[str, str, str]], kind: str) -> None:
    frames = []
    frame: Any = sys._getframe(2)
    while frame is not None:
        frames.append((Path(frame.f_code.co_filename), frame.f_code.co_name))
        frame = frame.f_back
    if any(path.name == "interpreter.py" and path.parent.name == "runtime" for path, _ in frames):
        return
    product = [f"{path.stem}.{name}" for path, name in frames if PRODUCT in path.parents]
    # Backward passes run in threads of torch.
    if "loop.train" in product or threading.current_thread() is not threading.main_thread():
        folder = Path(__file__).parent
        others = [
            f"{path.stem}.{name}"
            for path, name in frames
            if "torch" not in path.parts and path.parent != folder
        ]
        waits[kind, product[0] if product else "", others[0] if others else ""] += 1


def _memory(device: ModuleType | None, *, reset: bool = False) -> dict[str, int]:
    if device is None:
        return {"live": 0, "peak": 0}
    if reset:
        device.reset_peak()
    return {"live": device.live_bytes(), "peak": device.peak_bytes()}


if __name__ == "__main__":
    main(*sys.argv[1:])
