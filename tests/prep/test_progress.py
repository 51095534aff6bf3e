"""Progress: a log line every ten seconds or a bar on a terminal, with the right numbers."""

import io
import logging
import sys
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prep.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that `progress` reads, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr("prep.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@given(st.lists(st.tuples(st.integers(0, 9000), st.floats(0.5, 30)), max_size=20))
@settings(
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_log_has_the_work_done_and_at_most_a_line_every_ten_seconds(
    clock: list[float], caplog: pytest.LogCaptureFixture, steps: list[tuple[int, float]]
) -> None:
    caplog.clear()
    caplog.set_level(logging.INFO, logger="prep.progress")
    done, started, last, expected = 0, clock[0], clock[0], []
    with progress("reading", 10**6, "bytes") as advance:
        for number, seconds in steps:
            clock[0] += seconds
            done += number
            advance(number, "of them good")
            if clock[0] - last >= 10:
                last = clock[0]
                rate = done / (last - started)
                expected.append(f"reading: {done:,} of 1,000,000 bytes, {rate:,.0f}/s")
    assert [record.message.partition("/s")[0] + "/s" for record in caplog.records] == expected
    assert all(record.message.endswith(" of them good") for record in caplog.records)


def test_an_unknown_total_has_no_share_and_no_time_left(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="prep.progress")
    with progress("reading 100%", 0, "rows") as advance:
        clock[0] += 10
        advance(50)
    (record,) = caplog.records
    assert record.message.strip() == "reading 100%: 50 rows, 5/s"


def test_a_terminal_has_a_bar_and_no_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="prep.progress")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("reading", 100, "rows") as advance:
        advance(40)
        advance(60, "of them good")
    assert "100 rows" in terminal.getvalue()
    assert caplog.records == []
    quiet = Terminal()
    monkeypatch.setattr(sys, "stderr", quiet)
    caplog.set_level(logging.WARNING, logger="prep.progress")
    with progress("reading", 100, "rows") as advance:
        advance(100)
    assert quiet.getvalue() == ""
