"""For tests of push and pull: small sets, the commands, and a hub for the client in this process or
in another."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hub_state import TOKEN, Fault, Hub
from shard_sets import random_packs, write_shard_set
from writable_hub import serve_hub

from prep.cli.main import cli

REPO = "writer/tiny-shards"
COLUMNS_PER_SHARD = 7
PROGRAM = Path(sys.executable).with_name("sft-prep")


def make_set(path: Path, *, seed: int = 0, num_packs: int = 4, name: str = "tiny") -> Path:
    def write(where: Path, packs: int, seed: int) -> Path:
        made_up = random_packs(num_packs=packs, max_seq_len=64, vocab_size=90, seed=seed)
        return write_shard_set(
            where, made_up, max_seq_len=64, vocab_size=90, packs_per_shard=2, name=name
        )

    write(path, num_packs, seed)
    write(path / "eval", 1, seed + 100)
    (path / "build_info.json").write_text('{"host": "my-machine"}')
    (path / "rejects.jsonl.zst").write_bytes(b"rows of mine")
    return path


def content(path: Path) -> dict[str, bytes]:
    """Return the files of a set that are its content."""
    files = {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }
    return {
        name: data
        for name, data in files.items()
        if name not in ("build_info.json", "rejects.jsonl.zst")
    }


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def done(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refused(code: int, *arguments: object) -> str:
    result = run(*arguments)
    assert (result.exit_code, result.stderr.count("error: ")) == (code, 1), (
        result.output,
        result.exception,
    )
    return next(line for line in result.stderr.splitlines() if line.startswith("error: "))


@contextmanager
def client_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client in this process talks to, without Xet, without waiting between
    attempts."""
    from huggingface_hub import close_session, constants

    for name in [key for key in os.environ if key.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with serve_hub() as served:
        for name, value in {
            "ENDPOINT": served.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": (
                served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
            ),
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "AGENT_HARNESSES_PATH": str(tmp_path / "cache" / "harnesses.json"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        close_session()
        yield served
        close_session()


def command(hub: Hub, home: Path, *arguments: object) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1",
    }
    words = [PROGRAM, *map(str, arguments)]
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kill_at(fault: Fault, process: subprocess.Popen[str]) -> None:
    with process:
        assert fault.reached.wait(60), process.communicate()
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    fault.released.set()


class FullDisk:
    """Stands for a call of the system that fails from its nth time on."""

    def __init__(self, call: Callable[..., None], *, after: int, error: BaseException) -> None:
        self.call, self.left, self.error = call, after, error

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error
        self.call(*arguments, **options)


FULL = OSError(errno.ENOSPC, "No space left on device")
