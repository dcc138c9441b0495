from pathlib import Path

import pytest

from gistfast.evaluation.report import Panel, draw_panels, print_panels, scores_of

SCORES = {"before": {"nDCG@10": 0.25, "STS": 0.5}, "after": {"nDCG@10": 0.75}}


def test_evaluation_becomes_named_scores() -> None:
    results = {
        "model": "m",
        "retrieval": {"source": "s", "queries": 3, "ndcg@10": 0.5, "recall@1": 0.25},
        "sts": {"pairs": 9, "spearman": 0.75},
        "mteb": {"Task": 0.125},
    }
    assert scores_of(results) == {"nDCG@10": 0.5, "recall@1": 0.25, "Spearman": 0.75, "Task": 0.125}


def test_table_has_a_row_a_model_and_leaves_gaps_empty(capsys: pytest.CaptureFixture[str]) -> None:
    print_panels([Panel("Scores", SCORES)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.strip(" ─")] == [
        ["Scores"],
        ["nDCG@10", "STS"],
        ["before", "0.250", "0.500"],
        ["after", "0.750"],
    ]


def test_picture_is_a_png_of_all_panels(tmp_path: Path) -> None:
    panels = [Panel("Scores", SCORES), Panel("Seconds", {"seconds": {"training": 60.0}}, ".0f")]
    picture = draw_panels(tmp_path / "scores.png", panels)
    assert picture.read_bytes().startswith(b"\x89PNG")
