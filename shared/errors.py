"""Every error that a user can cause, as one tree; only the two cli modules catch it.

    SftError
     |- ConfigError            3  unknown key, bad value, sections that contradict each other
     |- DataError              4  a row, a message or a source that cannot be used
     |   |- TemplateError         the template cannot render the row, or its spans cannot be proved
     |   '- SampleTooLongError    a sample over max_seq_len where the policy says "error"
     |- ArtifactError          5  a shard set, sample store, run or checkpoint that cannot be used
     |   |- FormatVersionError
     |   |- ChecksumError
     |   |- IncompleteArtifactError
     |   '- FingerprintMismatchError
     |- PrerequisiteError      6  a package, device or program that is missing
     '- StoppedOnRequest      75  state is saved; run the same command again to resume

A message says the value seen, the value expected, where, and what to do. `show`, `shorten` and
`one_line` make its quotations short.
"""


def shorten(text: str, limit: int) -> str:
    """Return `text`, cut to `limit` characters that end in "..." where it is longer."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def show(value: object) -> str:
    """Return a value of a user's file as a message shows it."""
    return shorten(repr(value), 60)


def one_line(exc: BaseException) -> str:
    """Return the message of a foreign exception on one line, or its type where it has none."""
    return shorten(" ".join(str(exc).split()) or type(exc).__name__, 300)


class SftError(Exception):
    """Base of all errors that are reported as one line with an exit code."""

    exit_code = 1


class ConfigError(SftError):
    exit_code = 3


class DataError(SftError):
    exit_code = 4


class TemplateError(DataError):
    pass


class SampleTooLongError(DataError):
    pass


class ArtifactError(SftError):
    exit_code = 5


class FormatVersionError(ArtifactError):
    pass


class ChecksumError(ArtifactError):
    pass


class IncompleteArtifactError(ArtifactError):
    pass


class FingerprintMismatchError(ArtifactError):
    pass


class PrerequisiteError(SftError):
    exit_code = 6


class StoppedOnRequest(SftError):
    exit_code = 75
