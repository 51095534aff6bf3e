"""TOML tables -> frozen dataclasses: what is accepted, and that every refusal names the key and
what was expected."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from shared import config
from shared.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Mask:
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    boundary: Literal["overlap", "inside"] = "overlap"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    path: str
    fraction: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    name: str
    max_seq_len: int
    dedup: bool = False
    ratio: float = 0.5
    betas: tuple[float, float] = (0.9, 0.999)
    stage: Literal[0, 3] = 3
    columns: dict[str, str] = field(default_factory=dict)
    free: Any = None
    mask: Mask = field(default_factory=Mask)
    sources: tuple[Source, ...] = ()

    def __post_init__(self) -> None:
        if self.max_seq_len < 2:
            raise ConfigError(f"max_seq_len = {self.max_seq_len}; expected at least 2")


REQUIRED: dict[str, Any] = {"name": "demo", "max_seq_len": 64}


def make(**tables: Any) -> Mixture:
    return config.build(Mixture, {**REQUIRED, **tables}, "demo.toml")


def test_defaults_fill_what_is_not_given() -> None:
    assert make() == Mixture(name="demo", max_seq_len=64)


def test_every_kind_of_value_is_built() -> None:
    built = make(
        dedup=True,
        ratio=1,
        betas=[0.8, 1],
        stage=0,
        columns={"messages": "chat"},
        free={"any": [1, "x"]},
        mask={"boundary": "inside"},
        sources=[{"path": "a.jsonl"}, {"path": "b.jsonl", "fraction": 0.5}],
    )
    assert built.ratio == 1.0
    assert isinstance(built.ratio, float)
    assert built.betas == (0.8, 1.0)
    assert built.mask == Mask(boundary="inside")
    assert built.sources == (Source(path="a.jsonl"), Source(path="b.jsonl", fraction=0.5))
    assert built.free == {"any": [1, "x"]}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"max_seq_length": 64},
            "demo.toml: unknown key 'max_seq_length'; did you mean 'max_seq_len'?",
        ),
        (
            {"mask": {"bondary": "inside"}},
            "demo.toml: unknown key 'mask.bondary'; did you mean 'boundary'?",
        ),
        ({"mask": {"zzz": 1}}, "demo.toml: unknown key 'mask.zzz'; known: boundary, train_on"),
        ({"sources": [{}]}, "demo.toml: missing key 'sources.0.path'; add it"),
        ({"max_seq_len": "64"}, "demo.toml: max_seq_len = '64'; expected a whole number"),
        ({"max_seq_len": 64.0}, "demo.toml: max_seq_len = 64.0; expected a whole number"),
        ({"max_seq_len": True}, "demo.toml: max_seq_len = True; expected a whole number"),
        ({"max_seq_len": 1}, "demo.toml: max_seq_len = 1; expected at least 2"),
        ({"dedup": 1}, "demo.toml: dedup = 1; expected true or false"),
        ({"ratio": "half"}, "demo.toml: ratio = 'half'; expected a number"),
        ({"ratio": float("nan")}, "demo.toml: ratio = nan; expected a finite number"),
        ({"ratio": True}, "demo.toml: ratio = True; expected a number"),
        ({"name": 7}, "demo.toml: name = 7; expected text (in quotes)"),
        ({"betas": [0.9]}, "demo.toml: betas has 1 values; expected 2"),
        ({"betas": 0.9}, "demo.toml: betas = 0.9; expected a list"),
        ({"stage": True}, "demo.toml: stage = True; expected one of 0, 3"),
        ({"stage": 3.0}, "demo.toml: stage = 3.0; expected one of 0, 3"),
        (
            {"mask": {"train_on": "asistant"}},
            "demo.toml: mask.train_on = 'asistant'; "
            'expected one of "assistant", "last_assistant", "all"; did you mean \'assistant\'?',
        ),
        ({"mask": "all"}, "demo.toml: mask is 'all'; expected a table"),
        (
            {"columns": {"messages": 3}},
            "demo.toml: columns.messages = 3; expected text (in quotes)",
        ),
        ({"columns": []}, "demo.toml: columns = []; expected a table"),
    ],
)
def test_a_wrong_table_is_refused_with_its_key_and_what_was_expected(
    tables: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**tables)
    assert str(caught.value).startswith(message)
    assert caught.value.exit_code == 3


def test_a_missing_required_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"demo\.toml: missing key 'max_seq_len'"):
        config.build(Mixture, {"name": "demo"}, "demo.toml")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("ratio=1e-3", 1e-3),
        ("ratio = 3", 3),
        ("dedup=true", True),
        ("name=inside", "inside"),
        ('name="7"', "7"),
        ("name=a=b", "a=b"),
        ("name=meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("name=", ""),
        ("betas=[0.9, 0.95]", [0.9, 0.95]),
        ("name=1\nname=2", "1\nname=2"),
    ],
)
def test_a_setting_is_read_as_toml_or_else_as_text(setting: str, value: Any) -> None:
    key = setting.split("=")[0].strip()
    assert config.apply_settings({}, [setting]) == {key: value}


def test_settings_reach_into_tables_and_lists_and_leave_the_original_alone() -> None:
    tables = {"sources": [{"path": "a"}, {"path": "b"}], "betas": [0.9, 0.99]}
    done = config.apply_settings(
        tables, ["sources.1.path=c", "betas.0=0.5", "mask.boundary=inside"]
    )
    assert done == {
        "sources": [{"path": "a"}, {"path": "c"}],
        "betas": [0.5, 0.99],
        "mask": {"boundary": "inside"},
    }
    assert tables == {"sources": [{"path": "a"}, {"path": "b"}], "betas": [0.9, 0.99]}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("ratio", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("sources.2.path=x", "'2' is not an index of a list of 1"),
        ("sources.x=1", "'x' is not an index of a list of 1"),
        ("sources.\u00b2.path=x", "is not an index of a list of 1"),
        ("name.deep.key=1", "name is a value, not a table"),
        ("name.key=1", "name is a value, not a table"),
        ("betas.0.key=1", "betas.0 is a value, not a table"),
        ("betas.0.deep.key=1", "betas.0 is a value, not a table"),
    ],
)
def test_a_setting_that_reaches_nowhere_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.apply_settings({"name": "x", "sources": [{}], "betas": [0.9]}, [setting])
    assert message in str(caught.value)
    assert repr(setting) in str(caught.value)


def test_differences_names_every_leaf_that_differs() -> None:
    old = {
        "a": 1,
        "mask": {"boundary": "overlap", "same": [1]},
        "sources": [{"path": "x"}],
        "gone": 3,
    }
    new = {
        "a": 2,
        "mask": {"boundary": "inside", "same": [1]},
        "sources": [{"path": "y"}],
        "added": None,
    }
    assert config.differences(old, new) == [
        ("a", 1, 2),
        ("added", None, None),
        ("gone", 3, None),
        ("mask.boundary", "overlap", "inside"),
        ("sources.0.path", "x", "y"),
    ]


def test_lists_of_other_lengths_differ_as_a_whole() -> None:
    assert config.differences({"a": [1]}, {"a": [1, 2]}) == [("a", [1], [1, 2])]


@pytest.mark.parametrize(("old", "new"), [(1, 1.0), (1, True), (0, False), ("1", 1)])
def test_values_with_another_digest_differ(old: Any, new: Any) -> None:
    assert config.differences({"a": old}, {"a": new}) == [("a", old, new)]


def test_equal_trees_do_not_differ() -> None:
    assert config.differences({"a": [{"b": None}]}, {"a": [{"b": None}]}) == []


def test_plain_trees_build_the_same_dataclass_again() -> None:
    built = make(betas=[0.8, 0.9], sources=[{"path": "a"}], columns={"m": "chat"})
    assert config.build(Mixture, config.to_plain(built), "again") == built


def test_an_absent_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config file .*no\.toml"):
        config.load_toml(tmp_path / "no.toml")


def test_a_directory_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config file"):
        config.load_toml(tmp_path)


@pytest.mark.parametrize("data", [b"name = ", b"a = 1\na = 2", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_a_config_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML"):
        config.load_toml(path)
