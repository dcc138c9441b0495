"""A worker process: `python -m gistfast.engines.worker`, started by `gistfast.engines.processes`.

Its first line of input is its job, as JSON; the end of its input is the order to stop, so that no worker outlives
the process that started it. It answers on its output, one JSON object a line:

    {"texts": 32, "tokens": 980, "padded": 1004}
                           so many texts are embedded, of so many tokens, without and with padding
    {"committed": 65536}   a shard of so many texts is committed
    {"warning": "..."}     something to tell the user
    {"error": "StoreError", "message": "..."}
"""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import IO, Any

from gistfast.errors import GistfastError

Report = Callable[..., None]


def main() -> int:
    """Do one job; the exit code."""
    report = _reporter()
    try:
        job: dict[str, Any] = json.loads(sys.stdin.readline())
        threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
        _embed(job, report)
    except GistfastError as error:
        report(error=type(error).__name__, message=str(error))
        return 1
    except (KeyboardInterrupt, BrokenPipeError):
        return 130
    return 0


def _embed(job: Mapping[str, Any], report: Report) -> None:
    import torch

    from gistfast.engines.job import embed_part

    logging.getLogger().addHandler(_Forward(report))
    torch.set_num_threads(job["threads"])
    embed_part(
        job["settings"],
        job["store"],
        job["part"],
        on_batch=lambda done: report(texts=done.num_texts, tokens=done.num_tokens, padded=done.num_padded),
        on_commit=lambda count: report(committed=count),
    )


def _reporter() -> Report:
    """Writes one report to what was the output; whatever libraries print goes to the error stream from now on."""
    output: IO[str] = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lock = threading.Lock()

    def report(**record: object) -> None:
        with lock:
            output.write(json.dumps(record) + "\n")
            output.flush()

    return report


class _Forward(logging.Handler):
    """Hands warnings to the process that draws the bar."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        """Report one line."""
        self._report(warning=record.getMessage())


def _stop_at_end_of_input() -> None:
    sys.stdin.read()
    # To the main thread, which may be waiting: as Ctrl-C does, it lets a shard that is being written be committed.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
