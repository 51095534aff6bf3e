"""The errors that a user can cause, with the exit codes of the contract, and what they quote."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from shared import errors


def all_errors(base: type[errors.SftError] = errors.SftError) -> list[type[errors.SftError]]:
    return [base, *(error for sub in base.__subclasses__() for error in all_errors(sub))]


def test_the_exit_codes_are_those_of_the_contract() -> None:
    codes = {error.__name__: error.exit_code for error in all_errors()}
    assert codes == {
        "SftError": 1,
        "ConfigError": 3,
        "DataError": 4,
        "TemplateError": 4,
        "SampleTooLongError": 4,
        "ArtifactError": 5,
        "FormatVersionError": 5,
        "ChecksumError": 5,
        "IncompleteArtifactError": 5,
        "FingerprintMismatchError": 5,
        "PrerequisiteError": 6,
        "StoppedOnRequest": 75,
    }


@given(st.text(max_size=80), st.integers(3, 70))
@settings(deadline=None)
def test_a_short_text_stays_and_a_long_one_keeps_its_beginning(text: str, limit: int) -> None:
    short = errors.shorten(text, limit)
    assert len(short) <= limit
    assert short == text if len(text) <= limit else short == text[: limit - 3] + "..."


@given(st.recursive(st.text() | st.integers() | st.none(), st.lists, max_leaves=40))
@settings(deadline=None)
def test_a_value_is_shown_as_python_writes_it_in_sixty_characters(value: Any) -> None:
    text = errors.show(value)
    assert len(text) <= 60
    assert repr(value).startswith(text.removesuffix("..."))


@given(st.text())
@settings(deadline=None)
def test_a_foreign_message_becomes_one_line_and_is_never_empty(message: str) -> None:
    line = errors.one_line(RuntimeError(message))
    assert 0 < len(line) <= 300
    assert len(line.splitlines()) == 1
    assert line == "RuntimeError" if not message.split() else message.split()[0][:297] in line
