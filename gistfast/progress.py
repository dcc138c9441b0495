"""Progress of long work: a bar with rate and time left on a terminal, a few log lines elsewhere."""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

logger = logging.getLogger(__name__)

# Logs share this console with the bars, so that a log line never cuts through a bar.
console = Console(stderr=True)

SECONDS_BETWEEN_LINES = 60.0


class Bar:
    """What the work calls as it goes on."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = 0
        self.begun_s = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count work as done; the note stands below the bar until the next one."""
        self.done += count

    def rate(self) -> float:
        """Units done each second since the beginning."""
        return self.done / max(time.monotonic() - self.begun_s, 1e-9)

    def summary(self) -> str:
        """How far the work is, in words."""
        total = f" of {self.total:,}" if self.total is not None else ""
        return f"{self.description}: {self.done:,}{total} {self.unit}, {self.rate():,.1f} {self.unit}/s"


class LogBar(Bar):
    """Writes to the log: where it stands once a minute, for work that nobody watches."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        super().__init__(description, total, unit)
        self._last_line_s = self.begun_s
        self._note = ""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count work as done, and say so once a minute."""
        super().advance(count, note)
        self._note = note or self._note
        if time.monotonic() - self._last_line_s < SECONDS_BETWEEN_LINES:
            return
        self._last_line_s = time.monotonic()
        # Nobody knows how long what has not begun will take.
        left = f", {(self.total - self.done) / self.rate():,.0f} s left" if self.total is not None and self.done else ""
        logger.info("%s%s%s", self.summary(), left, f", {self._note}" if self._note else "")


class RichBar(Bar):
    """Draws on the terminal."""

    def __init__(self, description: str, total: int | None, unit: str, display: Progress) -> None:
        super().__init__(description, total, unit)
        self._display = display
        self._task: TaskID = display.add_task(description, total=total, unit=unit, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count work as done and move the bar."""
        super().advance(count, note)
        if note:
            self._display.update(self._task, advance=count, note=note)
        else:
            self._display.update(self._task, advance=count)


class CountColumn(ProgressColumn):
    """`1,024/8,000 texts  93.1/s`."""

    def render(self, task: Task) -> Text:
        """The count, and the rate where one is known."""
        total = f"/{int(task.total):,}" if task.total is not None else ""
        speed = task.finished_speed or task.speed
        rate = f"  {speed:,.1f}/s" if speed else ""
        return Text(f"{int(task.completed):,}{total} {task.fields['unit']}{rate}")


class Display(Progress):
    """Bars, and below them their notes, which may be longer than what is left of a line."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars, then a line for each note."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(f"  {task.fields['note']}", "dim")


# Work inside work draws in the same display: rich admits one on a terminal.
_display: Display | None = None


@contextmanager
def _shared_display() -> Iterator[Display]:
    global _display
    if _display is not None:
        yield _display
        return
    columns: tuple[ProgressColumn, ...] = (TextColumn("{task.description}"), BarColumn(bar_width=24))
    columns += (CountColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Display(*columns, console=console) as _display:
        try:
            yield _display
        finally:
            _display = None


@contextmanager
def progress(description: str, *, total: int | None, unit: str) -> Iterator[Bar]:
    """A bar for one piece of work, drawn on a terminal and logged elsewhere.

    Args:
        description: What is done, as "embedding texts".
        total: Units of work, or None when nobody knows.
        unit: What is counted, in the plural.
    """
    if not console.is_terminal:
        logger.info("%s%s", description, f": {total:,} {unit}" if total is not None else "")
        log_bar = LogBar(description, total, unit)
        yield log_bar
        logger.info("%s", log_bar.summary())
        return
    with _shared_display() as display:
        yield RichBar(description, total, unit, display)
