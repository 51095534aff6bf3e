"""Three formats, a fraction, a filter, Qwen3's own template: build, verify, look, plot, push to a
hub and pull back."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_state import Hub
from prep_builds import REAL_DATA
from pushed_sets import REPO, client_of_a_hub, content, done

from shared.shard_reader import open_shard_set

MIXTURE = """
name = "three"
max_seq_len = 4096
[tokenizer]
name = "{data}/tokenizers/qwen3"
[template]
name = "tokenizer"
[[sources]]
path = "{data}/conversations/tau_bench_airline.jsonl.gz"
fraction = 0.5
[[sources]]
path = "{data}/raw/sharegpt_tools_en.json"
[[sources]]
path = "{data}/raw/alpaca_en.json"
max_tokens = 200
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with client_of_a_hub(tmp_path, monkeypatch) as served:
        yield served


@pytest.mark.slow
@pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason="the real conversations are not beside this checkout"
)
def test_from_three_formats_to_a_set_pulled_from_a_hub(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "three.toml").write_text(MIXTURE.format(data=REAL_DATA))
    out = tmp_path / "three"
    output = done("build", "--mixture", tmp_path / "three.toml", "--out", out)
    assert "fingerprint" in output
    manifest = open_shard_set(out).manifest
    tau, sharegpt, alpaca = manifest.sources
    assert (tau.rows_read, tau.rows_used, tau.rows_dropped) == (200, 100, {"not_chosen": 100})
    assert (sharegpt.rows_used, sharegpt.rows_dropped) == (299, {"few_loss_tokens": 1})
    assert sharegpt.details["format"] == "sharegpt"
    assert alpaca.details["format"] == "alpaca"
    assert alpaca.rows_used + sum(alpaca.rows_dropped.values()) == 999
    assert alpaca.rows_dropped
    assert "holds" in done("verify", out)
    page = tmp_path / "pack.html"
    done("inspect", out, "--row", "sharegpt_tools_en:0", "--html", page)
    assert "search_recipes" in re.sub("<[^>]+>", "", page.read_text(encoding="utf-8"))
    done("stats", out, "--plot", tmp_path / "stats.png")
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(done("stats", out, "--json"))["fingerprint"] == manifest.fingerprint
    done("push", out, REPO)
    done("pull", REPO, tmp_path / "pulled")
    assert content(tmp_path / "pulled") == content(out)
    assert "holds" in done("verify", tmp_path / "pulled")
