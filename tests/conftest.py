"""What the tests share: a real guide, a tiny student, a few pairs, and one thread."""

import os

# Before transformers, datasets or torch are imported: no hub, no bars, no thread pools.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")

import dataclasses
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import numpy as np

    from gistfast.rows.dataset import RowSource


@pytest.fixture(autouse=True)
def own_log_level() -> Iterator[None]:
    """The command sets how much is logged; the next test is not to know."""
    logger = logging.getLogger("gistfast")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The same sums in the same order on every machine, and no quarrel over cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def guide_folder() -> Path:
    """all-MiniLM-L6-v2, read from an installed package."""
    from gistfast.demo.models import demo_guide

    return demo_guide()


@pytest.fixture(scope="session")
def tiny_student(guide_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one layer, 32 wide, with random weights and the guide's vocabulary."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny") / "encoder"
    tokenizer = AutoTokenizer.from_pretrained(guide_folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    student = folder.parent / "student"
    encoder = Transformer(str(folder), max_seq_length=32)
    SentenceTransformer(modules=[encoder, Pooling(32, "mean")], device="cpu").save(str(student))
    return student


# Two anchors share a positive, as in real data.
PAIRS = [
    ("car", "a motor vehicle with four wheels"),
    ("automobile", "a motor vehicle with four wheels"),
    ("He needs a car to get to work.", "a motor vehicle with four wheels"),
    ("river", "a large natural stream of water"),
    ("The river was navigable for miles.", "a large natural stream of water"),
    ("violin", "a bowed stringed instrument"),
    ("fiddle", "a bowed stringed instrument"),
    ("to sleep", "be at rest with the mind and body switched off"),
    ("bread", "food made from dough of flour and water, usually raised and baked"),
    ("staff of life", "food made from dough of flour and water, usually raised and baked"),
    ("bank", "a financial institution that accepts deposits"),
    ("bank", "sloping land beside a body of water"),
]


@pytest.fixture
def pairs() -> list[tuple[str, str]]:
    """Twelve rows of anchor and positive."""
    return list(PAIRS)


@pytest.fixture
def pairs_file(pairs: list[tuple[str, str]], tmp_path: Path) -> Path:
    """The pairs as JSON lines with the columns anchor and positive."""
    path = tmp_path / "pairs.jsonl"
    lines = (json.dumps({"anchor": anchor, "positive": positive}) for anchor, positive in pairs)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class RandomGuide:
    """Vectors drawn at random, the same for the same text and prompt, around one direction in ten."""

    def __init__(self, width: int = 16, **changes: object) -> None:
        from gistfast.store import GuideInfo

        info = GuideInfo.of_vectors("random", "random", width=width, dtype="float16")
        self.info = dataclasses.replace(info, **changes)  # type: ignore[arg-type]
        self.num_embedded = 0

    def embed(
        self, texts: Sequence[str], role: str, on_batch: object = None
    ) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """One vector of length 1 a text."""
        import numpy as np

        prompt = self.info.query_prompt if role == "query" else self.info.document_prompt
        vectors = np.empty((len(texts), self.info.width), np.float32)
        for number, text in enumerate(texts):
            seed = zlib.crc32((prompt + text).encode())
            centre = np.random.default_rng(seed % 10).normal(size=self.info.width)
            vector = centre + 0.5 * np.random.default_rng(seed).normal(size=self.info.width)
            vectors[number] = vector / np.linalg.norm(vector)
        self.num_embedded += len(texts)
        return vectors


@pytest.fixture
def random_guide() -> type[RandomGuide]:
    """A guide that is there at once."""
    return RandomGuide


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Any]:
    """Makes a finished guide store of random vectors: `make_store(rows, width=16, dtype="float16", ...)`.

    Rows are tuples of texts: anchor, positive, negatives; `tasks` are their tasks.
    """

    def make(
        rows: Sequence[Sequence[str]],
        *,
        name: str = "store",
        holdout: float = 0.0,
        tasks: Sequence[str | None] | None = None,
        **guide: Any,
    ) -> Any:
        from gistfast.engines.shards import embed_shards
        from gistfast.rows.dataset import read_rows
        from gistfast.stages.precompute import write_rows
        from gistfast.store import GuideStore, StoreWriter

        columns = ["anchor", "positive", *(f"negative_{number}" for number in range(1, len(rows[0]) - 1))]
        source = tmp_path / f"{name}.jsonl"
        records = [dict(zip(columns, row, strict=True)) for row in rows]
        if tasks is not None:
            records = [record | {"task": task} for record, task in zip(records, tasks, strict=True)]
        source.write_text("\n".join(map(json.dumps, records)))
        model, data = RandomGuide(**guide), read_rows(source)
        with StoreWriter.create(tmp_path / name, guide=model.info, source=data, holdout=holdout) as writer:
            write_rows(writer, data)
            embed_shards(writer.vectors, model)
            return GuideStore.open(writer.publish())

    return make


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that a model is given as a guide from now on, in order."""
    from gistfast.guides.guide import ModelGuide

    texts: list[str] = []
    original = ModelGuide.embed

    def embed(guide: ModelGuide, given: list[str], role: Any, on_batch: Any = None) -> Any:
        texts.extend(given)
        return original(guide, given, role, on_batch)

    monkeypatch.setattr(ModelGuide, "embed", embed)
    return texts


@pytest.fixture
def source(tmp_path: Path) -> "RowSource":
    """The rows of `store_cases.ROWS`, from a file."""
    from store_cases import ROWS, source_of

    return source_of(tmp_path / "pairs.jsonl", ROWS)


@pytest.fixture
def more(tmp_path: Path) -> "RowSource":
    """The rows of `store_cases.MORE`, from a file."""
    from store_cases import MORE, source_of

    return source_of(tmp_path / "more.jsonl", MORE)
