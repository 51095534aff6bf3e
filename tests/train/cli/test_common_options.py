"""Options become a request and a request becomes options again; errors become exit codes."""

import dataclasses
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError, StoppedOnRequest
from train.cli.common_options import fields_from, reporting, train_request, verbosity_of
from train.cli.main import cli
from train.engine.launcher_env import single_process_env
from train.run.command_line import request_arguments
from train.run.prepare import TrainRequest

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1)
REQUESTS = st.builds(
    TrainRequest,
    shards=st.builds(Path, WORDS),
    recipe=st.none() | WORDS,
    model=st.none() | WORDS,
    output=st.none() | st.builds(Path, WORDS),
    eval_shards=st.none() | st.builds(Path, WORDS),
    max_steps=st.none() | st.integers(1, 10**9),
    stop_after=st.none() | st.integers(1, 10**9),
    push_to_hub=st.none() | WORDS,
    push_checkpoints=st.none() | WORDS,
    resume=st.just("auto") | WORDS,
    trust_checkpoint=st.booleans(),
    settings=st.lists(WORDS, max_size=3).map(tuple),
    verbosity=st.integers(-1, 2),
)


@given(REQUESTS)
@settings(deadline=None)
def test_the_command_line_of_a_request_makes_the_same_request(request_: TrainRequest) -> None:
    context = cli.make_context("sft-train", request_arguments(request_))
    assert train_request(context.params) == request_


def test_every_field_of_a_request_is_an_option_of_its_name() -> None:
    names = {parameter.name for parameter in cli.params}
    fields = {field.name for field in dataclasses.fields(TrainRequest)}
    assert fields - names == {"verbosity"}  # -v and -q


def test_a_request_lists_only_what_differs_from_the_defaults() -> None:
    assert request_arguments(TrainRequest(shards=Path("s"))) == ["--shards", "s"]


def test_only_fields_are_taken_from_the_options() -> None:
    assert fields_from(TrainRequest, {"shards": 1, "quiet": 2, "recipe": None}) == {
        "shards": 1,
        "recipe": None,
    }


@pytest.mark.parametrize(("quiet", "verbose", "expected"), [(0, 0, 0), (0, 2, 2), (1, 0, -1)])
def test_the_verbosity(quiet: bool, verbose: int, expected: int) -> None:
    assert verbosity_of({"quiet": quiet, "verbose": verbose}) == expected


def ends_with(error: BaseException, *, quiet_stop: bool = False) -> object:
    with pytest.raises(SystemExit) as caught, reporting(quiet_stop=quiet_stop):
        raise error
    return caught.value.code


def test_errors_have_their_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends_with(ConfigError("bad key")) == 3
    assert ends_with(KeyboardInterrupt()) == 130
    assert ends_with(StoppedOnRequest("saved")) == 75
    assert capsys.readouterr().err == "error: bad key\nstopped by Ctrl-C\nsaved\n"


def test_under_a_launcher_a_stop_on_request_is_no_failure() -> None:
    with reporting(quiet_stop=True):
        raise StoppedOnRequest("saved")
    assert ends_with(ConfigError("bad key"), quiet_stop=True) == 3


def test_the_lines_of_a_rank_name_it(capsys: pytest.CaptureFixture[str]) -> None:
    for context, name in ((single_process_env(), " [rank 0] I hello"), (reporting(), " I hello")):
        with context, reporting():
            logging.getLogger("train").info("hello")
        assert name in capsys.readouterr().err
