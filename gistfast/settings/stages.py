"""The settings of the commands: one frozen dataclass each, checked where it is made.

The command line, the Python functions and the record of a run all read these fields.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, Literal

from gistfast.errors import ConfigError
from gistfast.guides.kinds import guide_kind, refuse_address_alone, refuse_options_of_other_guides
from gistfast.settings.base import (
    Settings,
    argument,
    build,
    column_names,
    comma_separated,
    part_of_shards,
    refuse_bad_part,
    refuse_both,
    refuse_unknown_device,
    setting,
    to_dict,
    vector_places,
)
from gistfast.settings.train import TrainSettings

__all__ = [
    "EvaluateSettings",
    "PictureSettings",
    "PrecomputeSettings",
    "QuickstartSettings",
    "TrainSettings",
    "build",
    "to_dict",
]


@dataclass(frozen=True, kw_only=True)
class PrecomputeSettings(Settings):
    """Stage 1: from rows of text to a guide store."""

    about = "Write a guide store: each distinct text of SOURCE, embedded once."
    when_stopped = "stopped: the same command goes on from here, with --resume where it makes a new store"
    sections: ClassVar = {
        "columns": "Rows",
        "guide_prompt": "Guide",
        "guide_model": "Embedding servers and ready vectors",
        "index": "Index and mined negatives",
        "processes": "Processes and machines",
        "resume": "Stores that are there",
    }

    source: str = argument("File, folder, glob or hub id that holds the rows of text.")
    guide: str = setting(
        MISSING,
        "Guide model: a folder or a hub id; or the address of an embedding server (https://host/v1), or a file of "
        "texts whose vectors are ready.",
    )
    out: str = setting(MISSING, "Folder of the guide store to write.")

    columns: Mapping[str, str] | None = setting(
        None,
        "Where the columns are, e.g. anchor=title,positive=body; found by name when left out.",
        parse=column_names,
    )
    subset: str | None = setting(None, "Subset (configuration) of a hub data set.")
    split: str | None = setting(None, "Split of a data set.")
    revision: str | None = setting(None, "Revision of a hub data set.")
    on_bad_row: Literal["stop", "skip"] = setting("stop", "What to do with a row whose text is missing or empty.")
    holdout: float | None = setting(
        None,
        "Share of the distinct positives kept out of training, for evaluation; none, or as the store has it, when "
        "left out.",
        at_least=0,
        below=1,
    )

    guide_prompt: str | None = setting(
        None, "Prompt that stands before every text; the guide's own when left out, '' for none."
    )
    query_prompt: str | None = setting(None, "Prompt before anchors, in place of --guide-prompt.")
    document_prompt: str | None = setting(None, "Prompt before positives and negatives, in place of --guide-prompt.")
    pooling: Literal["mean", "cls", "last", "max", "weightedmean", "mean_sqrt_len"] | None = setting(
        None, "How the guide makes one vector of its tokens: a plain transformers guide needs it."
    )
    max_length: int | None = setting(
        None, "Tokens of a text that the guide sees; its own limit when left out.", at_least=3
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Precision that the guide computes in; auto is bfloat16 where the GPU or processor multiplies it."
    )
    store_dtype: Literal["float16", "float32"] = setting("float16", "Precision of the stored vectors.")
    guide_revision: str | None = setting(None, "Revision of a guide from the hub.")
    decode_with: str | None = setting(
        None,
        "Student whose tokenizer cuts and respells each text first, as a live guide would see it.",
    )
    device: str = setting("auto", "Device of the guide: auto, cpu, cuda or cuda:N.")
    tokens_per_batch: int | None = setting(
        None,
        "Tokens of a forward pass; when left out 1024 on a CPU, measured at the start on a GPU.",
        at_least=1,
    )
    attention: Literal["auto", "padded", "unpadded"] = setting(
        "auto", "Texts padded to one length or in one row; auto is one row on a GPU where that gives the same vectors."
    )
    guide_model: str | None = setting(None, "What an embedding server calls the model; a server needs it.")
    server_concurrency: int = setting(8, "Requests on their way to an embedding server at once.", at_least=1)
    server_batch: int = setting(32, "Texts of a request; halved where the server refuses so many.", at_least=1)
    server_timeout_s: float = setting(120.0, "Seconds without an answer after which a request is sent again.", above=0)
    server_retries: int = setting(6, "How often a request that failed is sent again.", at_least=0)
    api_key_env: str = setting(
        "GISTFAST_API_KEY", "Environment variable with the key of an embedding server; none is sent when it is not set."
    )
    vectors: Mapping[str, str] | None = setting(
        None,
        "Where ready vectors are, e.g. text=embedding or anchor=a.npy,positive=p.npy: columns of texts, and their "
        "columns of vectors or .npy files; found by name when left out.",
        parse=vector_places,
    )
    index: Literal["auto", "flat", "ivf", "pq", "none"] = setting("auto", "Kind of the FAISS index over the vectors.")
    index_memory: float | None = setting(
        None, "GiB of memory that the index may take; four fifths of what is free when left out.", above=0
    )
    negatives: int | None = setting(
        None,
        "Hard negatives to mine for each row, of all documents; none, or as the store has them, when left out.",
        at_least=1,
    )
    negatives_margin: float = setting(
        0.05, "How far the guide's score of a mined negative is below the positive's at least.", at_least=0, at_most=2
    )
    negatives_margin_strategy: Literal["absolute", "relative"] = setting(
        "relative", "Whether that margin is a score or a share of the positive's score."
    )

    processes: int | None = setting(
        None, "Processes that embed, threads or GPUs shared out among them; one for each GPU when left out.", at_least=1
    )
    shards: tuple[int, int] | None = setting(
        None, "Part of the shards to embed in this run, 0/8 to 7/8 for eight runs on one store.", parse=part_of_shards
    )
    rows_only: bool = setting(False, "Read the rows and stop, for runs with --resume to embed.")
    engine: Literal["local", "ray"] = setting("local", "Where processes run: on this machine, or on a Ray cluster.")
    address: str | None = setting(
        None, "Ray cluster to join, such as auto or HOST:PORT; one of this machine alone when left out."
    )

    resume: bool = setting(False, "Go on with an unfinished store.")
    overwrite: bool = setting(False, "Replace an existing store once the new one is complete.")
    append: bool = setting(False, "Add the rows that an existing store does not have.")
    add_guide: bool = setting(False, "Add the guide to an existing store of the same rows.")
    guide_weight: float = setting(1.0, "Weight of an added guide in the mean of the guides' scores.", above=0)
    guide_score: Literal["mean", "min", "max"] | None = setting(
        None, "How the scores of several guides become one, with --add-guide; mean when never given."
    )
    split_roles: bool = setting(
        False, "Keep a vector for each role of a text, for guides with a query prompt that are added later."
    )
    trust_remote_code: bool = setting(False, "Run code that comes with the guide. Only for models you trust.")

    def check(self) -> None:
        """Refuse settings that contradict each other."""
        refuse_both(self, "resume", "overwrite", "append", "add_guide")
        refuse_both(self, "shards", "rows_only")
        if self.shards is not None:
            refuse_bad_part(self.shards, self.shards)
        if not self.add_guide and (self.guide_weight != 1 or self.guide_score is not None):
            raise ConfigError("--guide-weight and --guide-score belong to a guide that is added: give --add-guide")
        if self.negatives is None and (self.negatives_margin, self.negatives_margin_strategy) != (0.05, "relative"):
            raise ConfigError("--negatives-margin and its strategy belong to mined negatives: give --negatives")
        refuse_unknown_device(self.device)
        refuse_address_alone(self.guide)
        refuse_options_of_other_guides(self, self.guide)
        if guide_kind(self.guide) == "server" and not self.guide_model:
            raise ConfigError(f"--guide-model is needed with --guide {self.guide}: what the server calls the model")
        if self.address is not None and self.engine != "ray":
            raise ConfigError(f"--address {self.address} is of a Ray cluster: add --engine ray, or leave it out")
        if self.engine == "ray" and ":" in self.device:
            raise ConfigError(f"--device {self.device}: Ray chooses the GPU of each process: give auto, cpu or cuda")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Settings):
    """Stage 3: what a model is worth."""

    about = "Measure MODEL: retrieval, similarity of pairs, MTEB tasks."

    model: str = argument("Model to measure: a folder or a hub id.")
    store: str | None = setting(None, "Guide store whose held-out rows are the retrieval test.")
    queries: str | None = setting(None, "File of queries: columns id and text.")
    corpus: str | None = setting(None, "File of documents: columns id and text.")
    qrels: str | None = setting(None, "File of judgements: columns query, document and score.")
    sts: str | None = setting(None, "File of scored pairs: columns sentence1, sentence2 and score.")
    tasks: tuple[str, ...] = setting((), "MTEB tasks by name.", parse=comma_separated)
    out: str | None = setting(None, "JSON file for the results.")
    batch_size: int = setting(32, "Texts embedded at once.", at_least=1)
    truncate_dim: int | None = setting(
        None, "Cut the model's vectors to this width, as of a student of --matryoshka-dims.", at_least=1
    )
    query_prompt: str | None = setting(None, "Prompt before queries; the model's own when left out.")
    document_prompt: str | None = setting(None, "Prompt before documents; the model's own when left out.")
    device: str = setting("auto", "Device of the model: auto, cpu, cuda or cuda:N.")
    revision: str | None = setting(None, "Revision of a model from the hub.")
    trust_remote_code: bool = setting(False, "Run code that comes with the model. Only for models you trust.")

    def check(self) -> None:
        """Refuse half a retrieval test, two of them, and nothing to measure."""
        refuse_both(self, "store", "queries")
        refuse_unknown_device(self.device)
        files = (self.queries, self.corpus, self.qrels)
        if any(files) and not all(files):
            raise ConfigError("--queries, --corpus and --qrels belong together: give all three")
        if not (self.store or self.queries or self.sts or self.tasks):
            raise ConfigError("nothing to measure: give --store, --queries with --corpus and --qrels, --sts or --tasks")


@dataclass(frozen=True, kw_only=True)
class PictureSettings(Settings):
    """What a training run was like, or is like so far."""

    about = "Draw the log of the training run RUN: loss, dropped candidates, evaluations."

    run: str = argument("Folder of the run, the --out of `gistfast train`.")
    out: str | None = setting(None, "PNG file to write; training.png in RUN when left out.")


@dataclass(frozen=True, kw_only=True)
class QuickstartSettings(Settings):
    """The three stages in one go, on the data that comes with the package."""

    about = "Run all three stages on data and models that come with gistfast."
    when_stopped = "stopped: the same command goes on from here"

    out: str = setting("quickstart", "Folder for the store, the student and the picture.")
    overwrite: bool = setting(False, "Run every stage again, even those that are done.")
