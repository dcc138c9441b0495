import mmap

import pytest

from gistfast.stages import memory_bench

SIZE = 32 << 20


def test_memory_is_that_of_a_run_that_was_stopped_and_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory_bench.main(["--texts", "600"]) == 0
    said = capsys.readouterr().out
    assert "600 distinct texts, 384 wide, index none" in said
    assert "MiB of its own beyond the loaded model" in said
    assert "first vectors " in said


def test_peak_is_seen_while_it_lasts() -> None:
    peak = memory_bench.Peak()
    # Pages of its own, where an array might get what the process had before.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with peak.watched(), mmap.mmap(-1, SIZE, flags=private) as held:
        held[:] = b"1" * SIZE
        peak.look()
    assert 30 < peak.own < 100
