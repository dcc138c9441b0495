"""What a trained student's card says about its guide, on top of what sentence-transformers writes."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentence_transformers import SentenceTransformer

from gistfast import __version__
from gistfast.settings.stages import TrainSettings, to_dict
from gistfast.training.collate import Rows, Split
from gistfast.training.run_folder import FREE_SETTINGS

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from gistfast.store import GuideInfo, GuideStore, Manifest

_BLOCKS = {
    "ap": "anchor to positives",
    "aa": "anchor to anchors",
    "pp": "positive to positives",
    "an": "anchor to negatives",
}
_SECTION_BEFORE = "## Training Details"


def card_rows(stores: Mapping[str, "GuideStore"], split: Split) -> "Dataset | DatasetDict":
    """The rows of a split as a dataset; of several stores as one for each that has any.

    Texts and ids are looked up when they are asked for: the card asks for a few.

    Args:
        stores: The guide stores by name.
        split: Which rows.
    """
    from datasets import DatasetDict

    rows = {name: _rows_of(store, split) for name, store in stores.items()}
    if len(stores) == 1:
        return next(iter(rows.values()))
    return DatasetDict({name: own for name, own in rows.items() if len(own)})


def _rows_of(store: "GuideStore", split: Split) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_dict({"row": Rows(store, split).numbers}).with_transform(partial(_texts_of, store))


def _texts_of(store: "GuideStore", batch: Mapping[str, list[int]]) -> dict[str, list[Any]]:
    ids = store.rows[batch["row"]]
    texts = {column: store.texts.take(ids[:, number]) for number, column in enumerate(store.columns)}
    return {**texts, "label": ids.tolist()}


def describe_data(model: SentenceTransformer, stores: Mapping[str, "GuideStore"], *, evaluated: bool) -> None:
    """Tell the card the data's names, and let its examples be the first rows instead of a random draw.

    Args:
        model: The student.
        stores: What it is trained on.
        evaluated: Whether held-out rows are evaluated during training.
    """
    first = _rows_of(next(iter(stores.values())), "train")[:3]
    card = model.model_card_data
    card.train_datasets = [{"name": _data_of(store)} for store in stores.values()]
    held_out = [store for store in stores.values() if evaluated and store.held_out.any()]
    card.eval_datasets = [{"name": f"{_data_of(store)}, held-out rows"} for store in held_out]
    card.widget = [{"source_sentence": first["anchor"][0], "sentences": first["positive"]}]
    card.usage_examples = [first["anchor"][0], *first["positive"]]


def _data_of(store: "GuideStore") -> str:
    return store.manifest.data.description


def guide_section(
    manifests: Mapping[str, "Manifest"],
    settings: TrainSettings,
    dropped: Mapping[str, float],
    best_step: int | None = None,
    *,
    best_by: str = "nDCG@10",
    processes: int = 1,
) -> str:
    """The section of the card, in Markdown.

    Args:
        manifests: Of each guide store, by its name.
        settings: Of the run.
        dropped: Mean share of the candidates dropped in each block.
        best_step: The step whose student was kept, None for the last.
        best_by: The measure by which it was the best.
        processes: Of the run.
    """
    facts = {f"Dropped, {_BLOCKS[block]}": f"{share:.2%} of the candidates" for block, share in dropped.items()}
    if processes > 1:
        facts["Steps"] = f"those of {processes} processes with {settings.batch_size} rows each, all of them candidates"
    settings_shown = _settings_that_matter(settings)
    facts["Student"] = ", ".join([f"began as `{settings_shown['student']}`", *_shape(settings)])
    if best_step is not None:
        facts["Student"] += f"; kept after step {best_step}, whose {best_by} was the highest"
    lines = []
    for name, manifest in manifests.items():
        lines += [f"### Store {name}", ""] if len(manifests) > 1 else []
        lines += [*_list(_store_facts(manifest)), *([""] if len(manifests) > 1 else [])]
    if len(manifests) > 1:
        mixing = settings.mixing or "proportional"
        lines += ["### All stores", "", f"- **Mixing:** {mixing}; no batch has rows of two stores"]
    lines += _list(facts)
    values = [f"- `{name}`: {value}" for name, value in settings_shown.items()]
    return "\n".join(
        [
            "## Guided Training",
            "",
            f"Trained with gistfast {__version__}: a candidate that the guide scores above the row's own "
            "positive was no negative. The guide's vectors were computed once, before the training.",
            "",
            *lines,
            "",
            "<details><summary>Settings</summary>",
            "",
            *values,
            "</details>",
            "",
            "",
        ]
    )


def _list(facts: Mapping[str, str]) -> list[str]:
    return [f"- **{name}:** {value}" for name, value in facts.items()]


def _store_facts(manifest: "Manifest") -> dict[str, str]:
    """The guides and the data of a store."""
    data = manifest.data
    facts: dict[str, str] = {}
    for number, guide in enumerate(manifest.guides):
        facts |= _guide_facts(guide, "Guide" if len(manifest.guides) == 1 else f"Guide {number + 1}")
    if len(manifest.guides) > 1:
        facts["Guides' score"] = f"{manifest.guide_score}, weights {', '.join(map(str, manifest.weights))}"
    return facts | {
        "Guide store": f"fingerprint `{manifest.fingerprint}`",
        "Data": f"{data.description}, fingerprint `{data.fingerprint}`",
        "Rows": f"{data.num_rows:,} with {data.num_texts:,} distinct texts; "
        f"{data.holdout:.1%} of the positives held out, {data.skipped:,} bad rows skipped",
    }


def _shape(settings: TrainSettings) -> list[str]:
    """What was made of the student before the first step, and what of it was not trained."""
    facts = []
    if settings.keep_layers is not None:
        facts.append(f"layers {', '.join(map(str, settings.keep_layers))}")
    if settings.dim is not None:
        facts.append(f"with a head to {settings.dim} dimensions")
    if settings.matryoshka_dims:
        facts.append(f"trained to be cut to {', '.join(map(str, settings.matryoshka_dims))} dimensions")
    if settings.freeze:
        facts.append(f"frozen: {', '.join(settings.freeze)}")
    if settings.lora_rank is not None:
        where = ", ".join(settings.lora_targets) or "all linear layers"
        facts.append(f"trained by LoRA of rank {settings.lora_rank} on {where}, merged into the weights")
    return facts


def _guide_facts(guide: "GuideInfo", name: str) -> dict[str, str]:
    facts = {
        name: f"`{guide.name}`" + (f" at revision `{guide.revision}`" if guide.revision else ""),
        f"{name}'s weights": f"hash `{guide.weights_hash}`, {guide.width} wide",
        f"{name}'s pooling": guide.pooling,
        f"{name}'s prompts": f"`{guide.query_prompt!r}` for anchors, `{guide.document_prompt!r}` for others",
        f"{name}'s tokens": "no limit" if guide.max_length is None else f"{guide.max_length} of a text at most",
        f"{name}'s vectors": f"computed in {guide.compute_dtype}, stored in {guide.dtype}",
    }
    if guide.decoded_with is not None:
        facts[f"{name}'s texts"] = f"as the tokenizer of `{guide.decoded_with}` decodes them"
    return facts


def add_section(card: Path, section: str) -> None:
    """Put the section into the card, before the details of the training."""
    # Sentence-transformers leaves the card out, with a line in the log, where it fails to make one.
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    before, heading, after = text.partition(_SECTION_BEFORE)
    card.write_text(before + section + heading + after, encoding="utf-8")


def _settings_that_matter(settings: TrainSettings) -> dict[str, Any]:
    """The settings without this machine's paths."""
    values = {name: value for name, value in to_dict(settings).items() if name not in FREE_SETTINGS}
    student = Path(settings.student).expanduser()
    if settings.eval_sts is not None:
        values["eval_sts"] = Path(settings.eval_sts).name
    return values | {"student": "/".join(student.resolve().parts[-2:]) if student.is_dir() else settings.student}
