"""`--rebuild` takes the place of a set of ours, and of nothing else; an odd `--out` is an error in
one line."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from prep_builds import build_set, chat, mixture_of, small_tokenizer, write_rows, write_toml

from prep.build.build import build
from prep.cli.main import cli
from prep.writing import replaceable_set
from shared.errors import ArtifactError, SftError
from shared.shard_reader import check_hashes, open_shard_set


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a mixture, its samples, and a set of another length."""
    folder = tmp_path_factory.mktemp("home")
    rows = write_rows(
        folder / "rows.jsonl", [chat(f"What is {n}?", f"It is {n}.") for n in range(40)]
    )
    tables = mixture_of([rows], small_tokenizer(folder / "tokenizer"), eval={"fraction": 0.3})
    write_toml(folder / "mix.toml", tables)
    build_set({**tables, "max_seq_len": 64}, folder / "old", store=folder / "store")
    return folder


def run_build(home: Path, out: object, *more: str) -> tuple[int, str]:
    arguments = [
        "build",
        "--mixture",
        home / "mix.toml",
        "--store",
        home / "store",
        "--workers",
        1,
        "--out",
        out,
    ]
    ended = CliRunner().invoke(cli, [*map(str, arguments), *more])
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    return ended.exit_code, ended.output


def tree(path: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()
    }


def old_set(home: Path, out: Path) -> Path:
    return Path(shutil.copytree(home / "old", out))


def test_a_set_of_ours_is_replaced(home: Path, tmp_path: Path) -> None:
    out = old_set(home, tmp_path / "out")
    assert run_build(home, out)[0] == 5
    assert run_build(home, out, "--rebuild")[0] == 0
    assert open_shard_set(out).manifest.max_seq_len == 128
    check_hashes(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


@pytest.mark.parametrize("version", [1, 99])
def test_a_set_of_another_format_version_is_replaced_and_its_samples_serve_again(
    version: int, home: Path, tmp_path: Path
) -> None:
    out = old_set(home, tmp_path / "out")
    for file in (out / "manifest.json", out / "eval" / "manifest.json"):
        file.write_text(
            json.dumps({**json.loads(file.read_bytes()), "format_version": version, "other": 1})
        )
    code, output = run_build(home, out)
    assert code == 5
    assert "--rebuild" in output
    before = {path: path.stat().st_ino for path in (home / "store").glob("*/chunk-*")}
    assert run_build(home, out, "--rebuild")[0] == 0
    assert {path: path.stat().st_ino for path in (home / "store").glob("*/chunk-*")} == before
    check_hashes(out)


@pytest.mark.parametrize("rebuild", [(), ("--rebuild",)])
def test_an_empty_directory_may_be_used(
    rebuild: tuple[str, ...], home: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    assert run_build(home, tmp_path / "out", *rebuild)[0] == 0
    check_hashes(tmp_path / "out")


def make_home(out: Path, home: Path) -> None:
    (out / "photos").mkdir(parents=True)
    (out / "photos" / "cat.jpg").write_bytes(b"cat")


def make_file(out: Path, home: Path) -> None:
    out.write_text("thesis")


def make_link_to_a_set(out: Path, home: Path) -> None:
    out.symlink_to(old_set(home, out.with_name("elsewhere")))


def make_dangling_link(out: Path, home: Path) -> None:
    out.symlink_to("nowhere")


def make_foreign_manifest(out: Path, home: Path) -> None:
    out.mkdir()
    (out / "manifest.json").write_text('{"format_version": 1, "name": "an extension"}')


def make_odd_manifest(out: Path, home: Path) -> None:
    out.mkdir()
    (out / "manifest.json").write_text("[" * 100_000)


def make_set_with_notes(out: Path, home: Path) -> None:
    (old_set(home, out) / "notes.txt").write_text("mine")


def make_set_with_notes_inside(out: Path, home: Path) -> None:
    (old_set(home, out) / "shards" / "00000" / "notes.txt").write_text("mine")


def make_set_with_a_shard_more(out: Path, home: Path) -> None:
    shutil.copytree(old_set(home, out) / "shards" / "00000", out / "shards" / "00001")


def make_set_with_a_linked_column(out: Path, home: Path) -> None:
    kept = out.with_name("kept")
    shutil.move(old_set(home, out) / "shards", kept)
    (out / "shards").symlink_to(kept)


def make_set_with_an_empty_folder(out: Path, home: Path) -> None:
    (old_set(home, out) / "drafts").mkdir()


@pytest.mark.parametrize(
    "make",
    [
        make_home, make_file, make_link_to_a_set, make_dangling_link, make_foreign_manifest,
        make_odd_manifest,
        make_set_with_notes, make_set_with_notes_inside, make_set_with_a_shard_more,
        make_set_with_a_linked_column,
        make_set_with_an_empty_folder,
    ],
)  # fmt: skip
def test_what_is_not_ours_alone_is_refused_and_stays(
    make: object, home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    make(out, home)  # type: ignore[operator]
    before = tree(tmp_path)
    code, output = run_build(home, out, "--rebuild")
    assert code == 5, output
    assert "Traceback" not in output
    assert {k: v for k, v in tree(tmp_path).items() if k != ".out.lock"} == before


def test_files_that_are_only_called_like_ours_stay(home: Path, tmp_path: Path) -> None:
    out = old_set(home, tmp_path / "out")
    for name in (".tmp-out-12", ".tmp-out-12-old", ".out.new", ".tmp-.out.new-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("mine")
    (tmp_path / ".tmp-out-13").write_text("a file of mine")
    (tmp_path / ".out.lock").write_text("mine too")
    before = {k: v for k, v in tree(tmp_path).items() if not k.startswith("out/")}
    assert run_build(home, out, "--rebuild")[0] == 0
    assert {k: v for k, v in tree(tmp_path).items() if not k.startswith("out/")} == before


def test_a_file_put_into_the_old_set_while_the_new_one_is_made_is_kept(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = old_set(home, tmp_path / "out")
    remove = replaceable_set.remove

    def late(path: Path) -> bool:
        (path / "notes").write_text("mine")
        return remove(path)

    monkeypatch.setattr(replaceable_set, "remove", late)
    assert run_build(home, out, "--rebuild")[0] == 0
    (kept,) = tmp_path.glob(".tmp-out-*-old/notes")
    assert kept.read_text() == "mine"
    check_hashes(out)


@pytest.mark.parametrize(
    "name", ["/", ".", "..", "x/..", "file/set", "file/deep/set", "n" * 201, "n" * 300,
    "d/" * 3000 + "x",
             "~no-such-user/x", "/proc/1/set", "/dev/null/set", "/dev/null"],
)  # fmt: skip
@pytest.mark.parametrize("rebuild", [(), ("--rebuild",), ("--dry-run",)])
def test_an_odd_place_is_an_error_with_an_exit_code(
    name: str, rebuild: tuple[str, ...], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    code, output = run_build(home, name, *rebuild)
    assert code in (3, 5, 6) or (
        rebuild == ("--dry-run",) and name.startswith(("/proc", "/dev"))
    ), output
    assert "Traceback" not in output
    assert (tmp_path / "file").read_text() == "mine"


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert replaceable_set.place_of(Path("~/sets/x")) == tmp_path / "sets" / "x"


def test_build_itself_refuses_too(home: Path, tmp_path: Path) -> None:
    from prep_builds import plan_of

    (tmp_path / "out").write_text("mine")
    tables = mixture_of([home / "rows.jsonl"], home / "tokenizer")
    with pytest.raises(ArtifactError, match="is a file"):
        build(plan_of(tables, tmp_path / "out"), rebuild=True)
    with pytest.raises(SftError):
        build(plan_of(tables, tmp_path / "out" / "below"), rebuild=True)
