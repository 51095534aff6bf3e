"""Resume with another number of ranks or another ZeRO stage, through DeepSpeed's universal
checkpoint.

    converted/state/zero/PARAMETER/{fp32,exp_avg,exp_avg_sq,step}.pt    whole tensors
    converted/state/zero/optimizer_state.pt                             steps done, hyperparameters
    converted/state/*_model_states.pt                                   other files of DeepSpeed

DeepSpeed's converter makes it from the files of several ranks, this module from those of one rank
(stage 0), and each stage can read it. Rank 0 converts files whose digests matched; the result is
removed once it is loaded.
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
# The first is what stages below 3 write and look for, the second is that of stage 3.
_WHOLE_NAME = "mp_rank_00_model_states.pt"
_SHARDED_NAME = "zero_pp_rank_0_mp_rank_00_model_states.pt"


def convert(
    checkpoint_dir: Path, out_dir: Path, *, zero_stage: int, parameters: dict[str, Parameter]
) -> None:
    """Write the universal form of a checkpoint that has `zero_stage` into `out_dir`; one rank calls
    it.

    `parameters`: the trained ones by name, in the order of the optimizer. Raises ArtifactError if
    DeepSpeed's converter fails.
    """
    source, target = checkpoint_dir / ENGINE_DIR / ENGINE_TAG, out_dir / ENGINE_TAG
    target.mkdir(parents=True)
    if zero_stage == 0:
        _convert_one_rank(source, target, list(parameters))
    else:
        # A separate process, since the converter prints and does not free its memory. With -P a
        # train.py in the working directory is not imported.
        command = [sys.executable, "-P", "-m", "deepspeed.checkpoint.ds_to_universal"]
        command += ["--inject_missing_state"]
        command += ["--input_folder", str(source), "--output_folder", str(target)]
        workers = str(max(1, (os.cpu_count() or 1) // 2))
        command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "DS_ACCELERATOR": "cpu"}
        )
        if done.returncode:
            last_line = done.stderr.strip().rsplit("\n", 1)[-1]
            raise ArtifactError(
                f"DeepSpeed could not convert {source} for another number of ranks or ZeRO stage"
                f" ({last_line}); resume with the number of ranks and the stage that wrote it"
            )
    _make_uniform(target / "zero", parameters)
    # Stages look for the rest of DeepSpeed's state under two names; a link serves both.
    for present, missing in ((_WHOLE_NAME, _SHARDED_NAME), (_SHARDED_NAME, _WHOLE_NAME)):
        if not (target / missing).exists() and (target / present).exists():
            os.link(target / present, target / missing)


def load_converted(engine: Any, converted: Path, *, parameters: dict[str, Parameter]) -> None:
    """Load the state that `convert` wrote into `engine`, which was started with
    `load_universal`."""
    if engine.zero_optimization_stage() == 0:
        assert isinstance(engine.optimizer, OneRankAdamW)
        _load_one_rank(engine.optimizer, converted / ENGINE_TAG / "zero", parameters)
        return
    base = engine.optimizer.optimizer
    decays = [group["weight_decay"] for group in base.param_groups]
    engine.load_checkpoint(
        str(converted), tag=ENGINE_TAG, load_lr_scheduler_states=False, load_module_strict=False
    )
    # Stage 3 gives every group the hyperparameters of the first, so norms and biases would decay
    # from now on. And all parameters share one counter of steps, which each of them would increase.
    for group, decay in zip(base.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in base.state.values():
        state["step"] = torch.tensor(float(state["step"]), device=state["step"].device)


def _convert_one_rank(source: Path, target: Path, names: list[str]) -> None:
    content = torch.load(source / _WHOLE_NAME, map_location="cpu", mmap=True, weights_only=False)
    optimizer, module = content.pop("optimizer"), content["module"]
    masters = optimizer["masters"] or [module[name] for name in names]
    for index, name in enumerate(names):
        state = {"fp32": masters[index], **optimizer["state"][index]}
        (target / "zero" / name).mkdir(parents=True)
        for key in _STATES:
            values = {"param": state[key].float().clone(), "cat_dim": 0}
            torch.save(values, target / "zero" / name / f"{key}.pt")
    groups = [{**group, "params": []} for group in optimizer["param_groups"]]
    _write_common(target / "zero", step=optimizer["state"][0]["step"], groups=groups)
    torch.save({**content, "module": {}}, target / _WHOLE_NAME)


def _write_common(folder: Path, *, step: torch.Tensor, groups: list[dict[str, Any]]) -> None:
    """Write what all parameters share, for stage 3 and for the stages below it."""
    state = {"state": {0: {"step": step}}, "param_groups": groups}
    common = {
        "optimizer_state_dict": state,
        "param_groups": groups,
        "ds_version": metadata.version("deepspeed"),
    }
    torch.save(common, folder / "optimizer_state.pt")


def _make_uniform(folder: Path, parameters: dict[str, Any]) -> None:
    """Rewrite the files so that every stage can read them.

    Stage 3 writes flat tensors and one counter of steps; the others write tensors in the shapes of
    the parameters and a counter beside each. Both use the same file names.
    """
    common = torch.load(folder / "optimizer_state.pt", weights_only=False)
    if "optimizer_state_dict" in common:
        step = common["optimizer_state_dict"]["state"][0]["step"]
    else:
        step = torch.load(folder / next(iter(parameters)) / "step.pt", weights_only=False)
    _write_common(folder, step=step, groups=common["param_groups"])
    for name, parameter in parameters.items():
        torch.save(step, folder / name / "step.pt")
        # Under ZeRO-3 a parameter is empty outside the forward pass; `ds_shape` is its shape.
        shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
        for key in _STATES:
            file = folder / name / f"{key}.pt"
            values = torch.load(file, weights_only=True)
            if isinstance(values, torch.Tensor):
                torch.save({"param": values.view(shape), "cat_dim": 0}, file)


@torch.no_grad()
def _load_one_rank(optimizer: OneRankAdamW, folder: Path, parameters: dict[str, Parameter]) -> None:
    common = torch.load(folder / "optimizer_state.pt", weights_only=False)["optimizer_state_dict"]
    step = next(iter(common["state"].values()))["step"]
    state = optimizer.state_dict()
    for index, (name, parameter) in enumerate(parameters.items()):
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
