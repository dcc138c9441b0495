import io
import logging

import pytest
from rich.console import Console

from gistfast import progress as module
from gistfast.progress import progress


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 120 columns was sent."""
    sent = io.StringIO()
    monkeypatch.setattr(module, "console", Console(file=sent, force_terminal=True, width=120))
    return sent


def test_no_terminal_gets_one_line_at_begin_and_end(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "gistfast"),
        progress("embedding texts", total=1000, unit="texts") as bar,
    ):
        bar.advance(400)
        bar.advance(600, note="2 tokens of padding")
    begin, end = caplog.messages
    assert begin == "embedding texts: 1,000 texts"
    assert end.startswith("embedding texts: 1,000 of 1,000 texts, ")
    assert end.endswith(" texts/s")


def test_long_work_reports_with_the_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    with (
        caplog.at_level(logging.INFO, "gistfast"),
        progress("embedding texts", total=10, unit="texts") as bar,
    ):
        bar.advance(0, note="padding 3 %")
        bar.advance(5)
    assert "5 of 10 texts" in caplog.messages[2]
    assert caplog.messages[2].endswith(" s left, padding 3 %")


def test_work_of_unknown_size_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gistfast"), progress("reading rows", total=None, unit="rows") as bar:
        bar.advance(7)
    assert caplog.messages[0] == "reading rows"
    assert caplog.messages[1].startswith("reading rows: 7 rows, ")


def test_failed_work_does_not_say_that_it_ended(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        with progress("reading rows", total=2, unit="rows"):
            raise RuntimeError

    with caplog.at_level(logging.INFO, "gistfast"), pytest.raises(RuntimeError):
        fail()
    assert caplog.messages == ["reading rows: 2 rows"]


def test_terminal_shows_count_and_note(terminal: io.StringIO) -> None:
    with progress("embedding texts", total=1000, unit="texts") as bar:
        bar.advance(1000, note="done soon")
    assert "1,000/1,000 texts" in terminal.getvalue()
    assert "done soon" in terminal.getvalue()


def test_work_inside_work_shares_one_display(terminal: io.StringIO) -> None:
    with progress("training", total=2, unit="steps") as outer:
        outer.advance()
        with progress("evaluating", total=3, unit="texts") as inner:
            inner.advance(3)
        outer.advance()
    assert "2/2 steps" in terminal.getvalue()
    assert "3/3 texts" in terminal.getvalue()
    assert module._display is None


def test_note_longer_than_the_line_is_there_to_its_end(terminal: io.StringIO) -> None:
    with progress("training", total=2, unit="steps") as bar:
        bar.advance(note=f"loss 0.5, {'much ' * 25}more")
    drawn = terminal.getvalue()
    assert "1/2 steps" in drawn
    assert "more" in drawn.rpartition("loss 0.5")[2]
