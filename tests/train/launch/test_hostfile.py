"""Hostfiles are read as DeepSpeed reads them; a line that it would misread is refused by name."""

from pathlib import Path

import pytest

from shared.errors import ConfigError
from train.launch.hostfile import read_hostfile


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_hosts_are_read_as_deepspeed_reads_them(tmp_path: Path) -> None:
    path = hostfile(
        tmp_path, "# the new ones\n\n  node-1\t slots=8  # rack 3\nme@10.0.0.2 slots=8\n"
    )
    hosts = read_hostfile(path)
    assert (hosts.names, hosts.addresses, hosts.slots) == (
        ("node-1", "me@10.0.0.2"),
        ("node-1", "10.0.0.2"),
        8,
    )
    from deepspeed.launcher.runner import _parse_hostfile

    assert _parse_hostfile(path.read_text().splitlines()) == {"node-1": 8, "me@10.0.0.2": 8}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=8\nb\n", "line 2: 'b'; expected `HOST slots=N`"),
        ("a slots=0\n", "line 1: 'a slots=0'; expected"),
        ("a slots=8 max_slots=9\n", "line 1"),
        ("-oProxyCommand=x slots=8\n", "line 1"),
        ("a;x slots=8\n", "line 1"),
        (
            "a slots=8\nb slots=4\n",
            "line 2: b has 4 slots and a has 8; every node runs the same number of ranks",
        ),
        ("a slots=8\na slots=8\n", "line 2: a is listed twice"),
        ("# nobody\n", "names no host"),
    ],
)
def test_a_bad_hostfile_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="hosts") as caught:
        read_hostfile(hostfile(tmp_path, text))
    assert message in str(caught.value)


def test_a_missing_hostfile_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the hostfile .*nowhere"):
        read_hostfile(tmp_path / "nowhere")
