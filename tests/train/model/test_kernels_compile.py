"""Liger's kernel compiles for GPUs with the arguments of train/model/loss.py; that needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel as kernel
from train.model.loss import LIGER_OPTIONS

capability, dtype, makes_gradient = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
types = {
    "X_ptr": "*" + dtype, "X_stride": "i32", "Y_ptr": "*i64", "Y_stride": "i32",
    "loss_ptr": "*fp32", "loss_stride": "i32", "n_cols": "i32",
}
constants = {**LIGER_OPTIONS, "BLOCK_SIZE": 32768, "HAS_GRADIENTS": makes_gradient}
assert {*types, *constants} == {*kernel.arg_names}, {*types, *constants} ^ {*kernel.arg_names}
source = ASTSource(
    fn=kernel,
    signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
    constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
)
made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 32})
assert f"sm_{capability}" in made.asm["ptx"]
print("cubin", len(made.asm["cubin"]) > 1000)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "makes_gradient"),
    [(80, "bf16", True), (90, "bf16", True), (90, "fp32", False)],
)
def test_the_loss_kernel_compiles_for(
    capability: int, dtype: str, makes_gradient: bool, tmp_path: Path
) -> None:
    """For A100 and H100, for training and evaluation. A new argument in a new release shows here
    instead of on a GPU."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(capability), dtype, str(makes_gradient)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env=environment,
    )
    assert done.stdout == "cubin True\n", done.stderr[-3000:]
