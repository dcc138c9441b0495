"""The quickstart: guide store, training and evaluation in one go, each stage reused where it is done already.

The student is the first three layers of the guide: small enough for a laptop, with much to gain.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gistfast
from gistfast.demo.data import wordnet_pairs, write_sts_pairs
from gistfast.demo.models import demo_guide
from gistfast.evaluation.report import Panel, draw_panels, print_panels, scores_of

logger = logging.getLogger(__name__)

HOLDOUT = 0.15
TRAINING: dict[str, Any] = {
    "keep_layers": (0, 1, 2),
    "batch_size": 64,
    "epochs": 1.0,
    "learning_rate": 2e-4,
    "temperature": 0.02,
}
MEASURES = ("nDCG@10", "MRR@10", "recall@10", "Spearman")
BLOCKS = {"ap": "anchor-positive", "aa": "anchor-anchor", "pp": "positive-positive"}

Result = dict[str, Any]


class Journal:
    """What each stage was given, what came out and how long it took, kept as one JSON file."""

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self._path = path
        self._overwrite = overwrite
        self._stages: dict[str, Result] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def stage(self, name: str, *, given: Result, makes: Path, work: Callable[[], Result]) -> Result:
        """The result of a stage, worked out only when it is not there.

        What an earlier version or other settings left is removed first; what the same settings left
        unfinished stays, for the stage to resume.

        Args:
            name: What the journal calls the stage.
            given: All that decides the result.
            makes: Folder or file that the stage leaves.
            work: Runs the stage; its result must fit JSON.
        """
        given = json.loads(json.dumps({"gistfast": gistfast.__version__, **given}))
        kept = self._stages.get(name, {})
        same = kept.get("given") == given and not self._overwrite
        if same and "result" in kept and makes.exists():
            logger.info("%s: done already", name)
            return dict(kept["result"])
        if kept and not same:
            _remove(makes)
        logger.info("%s", name)
        self._write(name, {"given": given})
        begun_s = time.monotonic()
        result = work()
        self._write(name, {"given": given, "elapsed_s": round(time.monotonic() - begun_s, 1), "result": result})
        return result

    def seconds(self) -> dict[str, float]:
        """How long each stage took when it ran."""
        return {name: stage["elapsed_s"] for name, stage in self._stages.items()}

    def _write(self, name: str, stage: Result) -> None:
        self._stages[name] = stage
        # Whole or not at all: a run that is killed here leaves the journal as it was.
        unfinished = self._path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self._stages, indent=1), encoding="utf-8")
        unfinished.replace(self._path)


def quickstart(out: str | Path = "quickstart", *, overwrite: bool = False) -> Path:
    """The picture of what the student gained; store, student and scores lie beside it.

    Args:
        out: Folder for all of it.
        overwrite: Run every stage again, even those that are done.

    Raises:
        DependencyError: When the packages of the demo are not installed.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / "quickstart.json", overwrite=overwrite)
    store = make_store(journal, folder)
    training = train_student(journal, folder, store)
    scores = score_models(journal, folder, store)
    dropped = {name: training["dropped"][block] for block, name in BLOCKS.items()}
    panels = [
        Panel("Held-out retrieval, and Spearman on the STS benchmark", scores),
        Panel("Candidates that the guide dropped", {"dropped": dropped}, ".1%"),
        Panel("Seconds of each stage", {"seconds": journal.seconds()}, ".0f"),
    ]
    print_panels(panels)
    picture = draw_panels(folder / "quickstart.png", panels)
    logger.info("picture: %s, student: %s", picture, folder / "student")
    return picture


def make_store(journal: Journal, folder: Path) -> Result:
    """Stage 1: the guide store of the WordNet pairs; returns its fingerprint and sizes."""
    source = wordnet_pairs()

    def work() -> Result:
        from gistfast.stages.precompute import precompute

        store = precompute(source, guide=demo_guide(), out=folder / "store", holdout=HOLDOUT, resume=True)
        return {"fingerprint": store.fingerprint, "rows": store.num_rows, "texts": store.num_texts}

    given = {"source": hashlib.sha256(source.read_bytes()).hexdigest(), "holdout": HOLDOUT}
    return journal.stage("guide store", given=given, makes=folder / "store", work=work)


def train_student(journal: Journal, folder: Path, store: Result) -> Result:
    """Stage 2: the guide's first layers, trained against the store; returns loss and dropped shares."""

    def work() -> Result:
        from gistfast.stages.train import train

        student = folder / "student"
        report = train(folder / "store", student=demo_guide(), out=student, resume=student.exists(), **TRAINING)
        return {"steps": report.steps, "loss": report.loss, "dropped": report.dropped}

    given = {"store": store["fingerprint"], **TRAINING}
    return journal.stage("training", given=given, makes=folder / "student", work=work)


def score_models(journal: Journal, folder: Path, store: Result) -> Result:
    """Stage 3: what the student was worth before and after, and what the guide is worth."""

    def work() -> Result:
        from gistfast.models.pretrained import no_weight_bar
        from gistfast.stages.evaluate import evaluate
        from gistfast.students.student import load_student

        before = folder / "student-before"
        with no_weight_bar():
            load_student(str(demo_guide()), keep_layers=TRAINING["keep_layers"]).save_pretrained(str(before))
        sts = write_sts_pairs(folder / "sts.jsonl")
        models = {"student before": before, "student after": folder / "student", "guide": demo_guide()}
        scores = {}
        for name, model in models.items():
            logger.info("evaluating the %s", name)
            found = scores_of(evaluate(model, store=folder / "store", sts=sts))
            scores[name] = {measure: found[measure] for measure in MEASURES}
        return scores

    given = {"store": store["fingerprint"], **TRAINING}
    return journal.stage("evaluation", given=given, makes=folder / "student-before", work=work)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
