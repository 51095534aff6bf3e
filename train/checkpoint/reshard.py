"""Go on with another number of ranks, or another ZeRO stage: through DeepSpeed's universal
checkpoint.

    converted/state/zero/PARAMETER/{fp32,exp_avg,exp_avg_sq,step}.pt    whole tensors
    converted/state/zero/optimizer_state.pt                             steps done, hyperparameters
    converted/state/*_model_states.pt                                   what DeepSpeed wants beside

DeepSpeed's converter makes it from what several ranks wrote, this module from what one rank wrote
(stage 0), and each stage reads it. The conversion is made aside by rank 0 from files whose digests
matched, and removed once it is loaded.
"""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from shared.errors import ArtifactError
from train.engine.single_rank_adamw import OneRankAdamW
from train.run.checkpoint_layout import ENGINE_DIR, ENGINE_TAG

_STATES = ("fp32", "exp_avg", "exp_avg_sq")
_WHOLE_NAME = (  # what stage 0 and the stages below 3 write, and look for
    "mp_rank_00_model_states.pt"
)
_SHARDED_NAME = "zero_pp_rank_0_mp_rank_00_model_states.pt"  # what stage 3 writes and looks for

Shapes = dict[str, torch.Size]


def convert(
    checkpoint_dir: Path, out_dir: Path, *, zero_stage: int, trained: dict[str, Parameter]
) -> None:
    """Make the universal form of a checkpoint, which was written with `zero_stage`, in `out_dir`;
    one rank calls it.

    `trained`: the parameters of the model that train, by name, in the order of the optimizer's.
    Raises ArtifactError if DeepSpeed's converter fails.
    """
    source, target = checkpoint_dir / ENGINE_DIR / ENGINE_TAG, out_dir / ENGINE_TAG
    target.mkdir(parents=True)
    if zero_stage == 0:
        _convert_one_rank(source, target, list(trained))
    else:
        _run_converter(source, target)
    _make_uniform(
        target / "zero", {name: _full_shape(parameter) for name, parameter in trained.items()}
    )
    for present, wanted in ((_WHOLE_NAME, _SHARDED_NAME), (_SHARDED_NAME, _WHOLE_NAME)):
        if not (target / wanted).exists() and (target / present).exists():
            os.link(target / present, target / wanted)


def load_converted(engine: Any, converted: Path, *, trained: dict[str, Parameter]) -> None:
    """Put the state that `convert` made into `engine`, which was started to load it."""
    if engine.zero_optimization_stage() == 0:
        assert isinstance(engine.optimizer, OneRankAdamW)
        _load_one_rank(engine.optimizer, converted / ENGINE_TAG / "zero", trained)
        return
    base = engine.optimizer.optimizer
    decays = [group["weight_decay"] for group in base.param_groups]
    engine.load_checkpoint(
        str(converted), tag=ENGINE_TAG, load_lr_scheduler_states=False, load_module_strict=False
    )
    # stage 3 gives every group the hyperparameters of the first, so that norms and biases would
    # decay from here on, and all of them one counter of steps, which each would count up
    for group, decay in zip(base.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in base.state.values():
        state["step"] = torch.tensor(float(state["step"]), device=state["step"].device)


def _run_converter(source: Path, target: Path) -> None:
    """In a process of its own: it prints, and leaves its memory behind; -P since the directory may
    hold a train.py."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--inject_missing_state",
    ]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    workers = str(max(1, (os.cpu_count() or 1) // 2))
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "DS_ACCELERATOR": "cpu"}
    )
    if done.returncode:
        last = done.stderr.strip().rsplit("\n", 1)[-1]
        raise ArtifactError(
            f"DeepSpeed could not convert {source} for another number of ranks or ZeRO stage"
            f" ({last}); go on with what it was written with"
        )


def _convert_one_rank(source: Path, target: Path, names: list[str]) -> None:
    written = torch.load(source / _WHOLE_NAME, map_location="cpu", mmap=True, weights_only=False)
    module, optimizer = written["module"], written["optimizer"]
    masters = optimizer["masters"] or [module[name] for name in names]
    for index, name in enumerate(names):
        moments = optimizer["state"][index]
        values = {
            "fp32": masters[index],
            "exp_avg": moments["exp_avg"],
            "exp_avg_sq": moments["exp_avg_sq"],
        }
        (target / "zero" / name).mkdir(parents=True)
        for key, tensor in values.items():
            torch.save(
                {"param": tensor.float().clone(), "cat_dim": 0},
                target / "zero" / name / f"{key}.pt",
            )
    groups = [{**group, "params": []} for group in optimizer["param_groups"]]
    _write_common(target / "zero", step=optimizer["state"][0]["step"], groups=groups)
    kept = {key: value for key, value in written.items() if key not in ("optimizer", "module")}
    torch.save({**kept, "module": {}}, target / _WHOLE_NAME)


def _write_common(folder: Path, *, step: torch.Tensor, groups: list[dict[str, Any]]) -> None:
    """Write what all parameters share, where stage 3 looks for it and where the stages below do."""
    state = {"state": {0: {"step": step}}, "param_groups": groups}
    common = {
        "optimizer_state_dict": state,
        "param_groups": groups,
        "ds_version": metadata.version("deepspeed"),
    }
    torch.save(common, folder / "optimizer_state.pt")


def _make_uniform(folder: Path, shapes: Shapes) -> None:
    """Stage 3 and the stages below it write, and want, different things under the same names; this
    form suits all.

    Stage 3 writes flat tensors and one counter of steps; the others tensors of the parameters'
    shapes and a counter beside each.
    """
    common = torch.load(folder / "optimizer_state.pt", weights_only=False)
    if "optimizer_state_dict" in common:
        step = common["optimizer_state_dict"]["state"][0]["step"]
    else:
        step = torch.load(folder / next(iter(shapes)) / "step.pt", weights_only=False)
    _write_common(folder, step=step, groups=common["param_groups"])
    for name, shape in shapes.items():
        torch.save(step, folder / name / "step.pt")
        for key in _STATES:
            file = folder / name / f"{key}.pt"
            loaded = torch.load(file, weights_only=True)
            if isinstance(loaded, torch.Tensor):
                torch.save({"param": loaded.view(shape), "cat_dim": 0}, file)


@torch.no_grad()
def _load_one_rank(optimizer: OneRankAdamW, folder: Path, trained: dict[str, Parameter]) -> None:
    common = torch.load(folder / "optimizer_state.pt", weights_only=False)["optimizer_state_dict"]
    step = next(iter(common["state"].values()))["step"]
    state = optimizer.state_dict()
    for index, (name, parameter) in enumerate(trained.items()):
        fp32, exp_avg, exp_avg_sq = (
            torch.load(folder / name / f"{key}.pt", weights_only=True)["param"] for key in _STATES
        )
        parameter.copy_(fp32.view_as(parameter))
        state["state"][index] = {
            "step": torch.tensor(float(step)),
            "exp_avg": exp_avg.view_as(parameter),
            "exp_avg_sq": exp_avg_sq.view_as(parameter),
        }
        if state["masters"]:
            state["masters"][index] = fp32.view_as(parameter)
    optimizer.load_state_dict(state)


def _full_shape(parameter: Any) -> torch.Size:
    """Under ZeRO-3 a parameter is empty outside the forward pass and keeps its shape in
    `ds_shape`."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
