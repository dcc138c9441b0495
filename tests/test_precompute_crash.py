"""Precompute that is killed, that finds the disk full, or a folder that cannot be written: nothing is lost."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from store_cases import FullDisk, contents, refusal_of

from gistfast.guides import open_guide
from gistfast.neighbours.index import read_report
from gistfast.stages.precompute import precompute
from gistfast.store import GuideStore
from gistfast.store.garbage import collect_garbage
from gistfast.store.mined import Mined

SCRIPT = Path(__file__).with_name("kill_precompute.py")
KILLS = 50


def pairs_in(path: Path, numbers: range) -> Path:
    """Rows of which two share a positive."""
    rows = ({"anchor": f"a question {number}", "positive": f"an answer {number // 2}"} for number in numbers)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return pairs_in(tmp_path / "first.jsonl", range(12))


@pytest.fixture
def second(tmp_path: Path) -> Path:
    """Some rows of the first, and others."""
    return pairs_in(tmp_path / "second.jsonl", range(8, 20))


def everything_in(store: GuideStore) -> tuple[Any, ...]:
    rows = (store.held_out.tolist(), store.task_of_rows.tolist(), store.pair_scores.tobytes())
    mined = [getattr(store.mined, field.name).tolist() for field in fields(Mined)]
    return store.fingerprint, *contents(store), *rows, *mined, read_report(store)


def files_in(folder: Path) -> list[str]:
    """Folders of a store with the files in them, by how many there are: names differ from run to run."""
    return sorted(path.parent.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_killed_processes_make_the_store_of_undisturbed_ones(
    first: Path, second: Path, tiny_student: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(SCRIPT), *map(str, (tiny_student, first, second, tmp_path, KILLS))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert sum(said["killed"]) >= KILLS
    undisturbed = GuideStore.open(tmp_path / "undisturbed")
    assert undisturbed.num_rows == 20
    collect_garbage(undisturbed.path)
    for path in map(Path, said["stores"]):
        killed = GuideStore.open(path)
        assert everything_in(killed) == everything_in(undisturbed)
        collect_garbage(path, now=True)
        assert files_in(path) == files_in(undisturbed.path)
        assert killed.verify() == []
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gistfast.store.ingest.ROWS_PER_SHARD", 4)


@pytest.fixture
def one_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested is the writing: the guide is loaded once."""
    monkeypatch.setattr(open_guide, "load_guide", cache(open_guide.load_guide))


@pytest.mark.usefixtures("small_shards", "one_guide")
def test_disk_full_at_any_write_of_an_append_loses_nothing(
    first: Path, second: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An append mines again as was mined before.
    before = precompute(first, guide=tiny_student, out=tmp_path / "before", negatives=2).path
    shutil.copytree(before, tmp_path / "whole")
    whole = precompute(second, guide=tiny_student, out=tmp_path / "whole", append=True)
    monkeypatch.setattr(os, "fsync", FullDisk(0))
    refusals = []
    for call in range(1, 200, 3):
        out = tmp_path / f"store-{call}"
        shutil.copytree(before, out)
        disk = FullDisk(call)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", disk)
            refusals.append(refusal_of(lambda out=out: precompute(second, guide=tiny_student, out=out, append=True)))
        if disk.calls_left > 0:
            break
        # Before the last step readers see the store of before, after it the new one.
        assert GuideStore.open(out).num_rows in (12, 20)
        assert GuideStore.open(out).verify() == []
        again = precompute(second, guide=tiny_student, out=out, append=True)
        assert everything_in(again) == everything_in(whole)
    assert refusals.pop() is None
    assert len(refusals) > 10
    assert all(line and "No space left on device" in line and "\n" not in line for line in refusals)


class LockedFolder:
    """A folder that everybody reads, and where nobody writes while it is locked, not even root."""

    NOBODY = 65534

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp())
        self._open_to_readers()

    def __enter__(self) -> None:
        self._open_to_readers(writable=False)
        if os.geteuid() == 0:
            os.seteuid(self.NOBODY)

    def __exit__(self, *_: object) -> None:
        if os.getuid() == 0:
            os.seteuid(0)
        self._open_to_readers()

    def _open_to_readers(self, *, writable: bool = True) -> None:
        for folder, _, files in os.walk(self.path):
            os.chmod(folder, 0o755 if writable else 0o555)
            for file in files:
                os.chmod(Path(folder, file), 0o644)


@pytest.fixture
def locked() -> Iterator[LockedFolder]:
    folder = LockedFolder()
    yield folder
    shutil.rmtree(folder.path)


@pytest.mark.usefixtures("small_shards", "one_guide")
class TestFolderThatCannotBeWritten:
    def refusal(self, locked: LockedFolder, source: Path, guide: Path, **options: Any) -> str:
        before = sorted(locked.path.rglob("*"))
        with locked:
            line = refusal_of(lambda: precompute(source, guide=guide, out=locked.path / "store", **options))
        assert line is not None
        assert "\n" not in line
        assert "Permission denied" in line
        assert sorted(locked.path.rglob("*")) == before
        return line

    @pytest.fixture
    def given(self, locked: LockedFolder, first: Path, second: Path, tiny_student: Path) -> tuple[Path, Path, Path]:
        """Two sources and a guide where everybody reads them; everything is loaded that is loaded late."""
        guide = shutil.copytree(tiny_student, locked.path / "guide")
        precompute(first, guide=guide, out=locked.path / "warm")
        return shutil.copy(first, locked.path), shutil.copy(second, locked.path), guide

    def test_new_store_is_refused_and_leaves_nothing(
        self, locked: LockedFolder, given: tuple[Path, Path, Path]
    ) -> None:
        first, _, guide = given
        assert self.refusal(locked, first, guide).startswith(f"cannot write {locked.path / 'store'}: ")
        assert precompute(first, guide=guide, out=locked.path / "store").num_rows == 12

    def test_append_is_refused_and_can_be_made_later(
        self, locked: LockedFolder, given: tuple[Path, Path, Path]
    ) -> None:
        first, second, guide = given
        store = precompute(first, guide=guide, out=locked.path / "store")
        refusal = self.refusal(locked, second, guide, append=True)
        assert "cannot write" in refusal
        assert refusal.endswith("then run the command again (precompute of a new store: with --resume)")
        assert store.verify() == []
        assert precompute(second, guide=guide, out=locked.path / "store", append=True).num_rows == 20

    def test_store_that_lacks_only_its_name_is_finished_later(
        self, locked: LockedFolder, given: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, _, guide = given
        with monkeypatch.context() as patch:
            patch.setattr("gistfast.store.StoreWriter.publish", lambda writer: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                precompute(first, guide=guide, out=locked.path / "store")
        assert "cannot write" in self.refusal(locked, first, guide, resume=True)
        assert precompute(first, guide=guide, out=locked.path / "store", resume=True).verify() == []
