from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gistfast.guides import bench as guide_bench
from gistfast.guides.guide import ModelGuide


def test_table_has_a_line_for_each_way(tiny_student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guide_bench.main(["--guide", str(tiny_student), "--texts", "40", "--repeats", "1"]) == 0
    said = capsys.readouterr().out
    assert "40 docstrings of " in said
    assert "padding factor 1." in said
    lines = [line for line in said.splitlines() if line.startswith("| ")][1:]
    names = [line.split("|")[1].strip() for line in lines]
    assert names[:2] == ["encode, float32", "gistfast, float32"]
    assert "| 1.00 (1.00 to 1.00) | 0.0e+00 | 0.0e+00 |" in lines[0]


def test_ways_of_attention_stand_beside_each_other(tiny_student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--guide", str(tiny_student), "--texts", "40", "--repeats", "1", "--attention", "padded", "unpadded"]
    assert guide_bench.main(words) == 0
    said = capsys.readouterr().out
    assert "| gistfast padded, float32 | " in said
    assert "| gistfast unpadded, float32 | " in said
    assert " 1.000 (gistfast unpadded, float32)" in said
    assert " 1.000 (gistfast padded, float32)" not in said


def test_wrong_vectors_give_no_figures(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ModelGuide._forward

    def blurred(guide: ModelGuide, batch: Any) -> Any:
        vectors = original(guide, batch)
        return vectors + 0.1 * np.abs(vectors).max() * (np.arange(vectors.size) % 3).reshape(vectors.shape)

    monkeypatch.setattr(ModelGuide, "_forward", blurred)
    with pytest.raises(SystemExit, match=r"gistfast, float32: a score is .* from encode's, .*: no figures"):
        guide_bench.main(["--guide", str(tiny_student), "--texts", "20", "--repeats", "1"])


def test_ratios_are_of_the_same_round() -> None:
    ways = [guide_bench.Contender(name, "float32", lambda texts: np.empty(0)) for name in ("encode, float32", "mine")]
    # The machine is three times as slow in the second round.
    seconds = {"encode, float32": np.array([4.0, 12.0]), "mine": np.array([1.0, 3.0])}
    errors = {way.name: np.zeros(1) for way in ways}
    assert "| mine | " in (table := guide_bench.report(ways, seconds, errors, num_texts=12))
    assert "4.00 (4.00 to 4.00)" in table


def test_texts_are_the_same_in_each_run_and_of_every_length() -> None:
    texts = guide_bench.docstrings(200)
    assert texts == guide_bench.docstrings(200)
    assert len(set(texts)) == 200
    lengths = np.array([len(text) for text in texts])
    assert np.percentile(lengths, 90) > 5 * np.percentile(lengths, 10)


def test_too_many_texts_are_refused_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guide_bench, "PACKAGES", ("gistfast.demo",))
    with pytest.raises(SystemExit, match=r"found (\d+) docstrings in gistfast.demo: give --texts \1 or fewer"):
        guide_bench.docstrings(1000)
