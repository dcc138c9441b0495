"""Training with the store against training with the guide in every step, on real text.

`LIVE_GUIDE_BATCH=64 pytest tests/test_live_guide.py --log-cli-level=INFO` shows figures of larger batches.
"""

import json
import logging
import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from gistfast.batches import EvenBatchSampler
from gistfast.stages.precompute import precompute
from gistfast.stages.train import train
from gistfast.store import GuideStore
from gistfast.students.student import load_student

logger = logging.getLogger(__name__)

STEPS = 20
BATCH_SIZE = int(os.environ.get("LIVE_GUIDE_BATCH", "8"))
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# No text is longer: a live guide of the same vocabulary gets the tokens that the student cut.
STUDENT = {"dropout": 0.0, "max_length": 64}


@dataclass(frozen=True)
class Run:
    """The loss of each step, and all weights before and after as one vector each."""

    losses: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor


def flat(model: SentenceTransformer) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()]).clone()


def losses(records: list[dict[str, Any]]) -> torch.Tensor:
    return torch.tensor([record["loss"] for record in records if "loss" in record], dtype=torch.float64)


def run_with_store(store: GuideStore, student: Path, out: Path, **options: Any) -> Run:
    """`gistfast train`."""
    train(
        store.path,
        student=student,
        out=out,
        max_steps=STEPS,
        batch_size=BATCH_SIZE,
        learning_rate=5e-5,
        logging_steps=1,
        save_steps=0,
        trackers=(),
        device="cpu",
        **STUDENT | options,
    )
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    begin = load_student(str(student), device="cpu", **STUDENT | options)
    return Run(losses(records), flat(begin), flat(SentenceTransformer(str(out), device="cpu")))


def run_with_guide(store: GuideStore, guide: Path, student: Path, out: Path, **options: Any) -> Run:
    """Sentence-transformers' trainer and loss on the same rows in the same order."""
    model = load_student(str(student), device="cpu", **STUDENT | options)
    begin = flat(model)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(out),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH_SIZE,
            batch_sampler=EvenBatchSampler,
            learning_rate=5e-5,
            warmup_steps=0.1,
            seed=42,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=store.to_dataset("train").remove_columns("label"),
        loss=GISTEmbedLoss(model, SentenceTransformer(str(guide), device="cpu")),
    )
    trainer.train()
    return Run(losses(trainer.state.log_history), begin, flat(model))


def difference(found: Run, expected: Run, what: str) -> tuple[float, float]:
    """Largest difference of a step's loss, and of the final weights as a share of the shorter way."""
    assert len(found.losses) == len(expected.losses) == STEPS
    assert torch.equal(found.begin, expected.begin)
    loss = (found.losses - expected.losses).abs().max().item()
    travelled = min((run.end - run.begin).norm().item() for run in (found, expected))
    weights = (found.end - expected.end).norm().item() / travelled
    logger.info(
        "%s: losses from %.4f to %.4f, largest difference of a step's loss %.1e, "
        "final weights differ by %.2e of the distance travelled",
        what,
        expected.losses[0],
        expected.losses[-1],
        loss,
        weights,
    )
    return loss, weights


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WordNet's pairs, each text once, so that both losses know the same of identity."""
    table = pyarrow.parquet.read_table(str(files("gistfast.demo") / "wordnet.parquet"))
    seen: set[str] = set()
    lines = []
    for row in table.select(["anchor", "positive"]).to_pylist():
        texts = set(row.values())
        if len(texts) == 2 and not texts & seen:
            seen |= texts
            lines.append(json.dumps(row))
    path = tmp_path_factory.mktemp("rows") / "wordnet.jsonl"
    path.write_text("\n".join(lines[: STEPS * BATCH_SIZE]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def foreign_student(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder with random weights and a tokenizer of its own, made from the rows."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = [text for line in source.read_text().splitlines() for text in json.loads(line).values()]
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=1500, special_tokens=SPECIAL_TOKENS))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    BertModel(BertConfig(vocab_size=tokenizer.get_vocab_size(), **sizes)).save_pretrained(folder / "encoder")
    encoder = Transformer(str(folder / "encoder"), max_seq_length=12)
    SentenceTransformer(modules=[encoder, Pooling(64, "mean")], device="cpu").save(str(folder / "student"))
    return folder / "student"


def make_store(source: Path, guide: Path, out: Path, **options: Any) -> GuideStore:
    return precompute(source, guide=guide, out=out, index="none", device="cpu", dtype="float32", **options)


@pytest.fixture(scope="module")
def store(source: Path, guide_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> GuideStore:
    """The guide's vectors as the guide gives them."""
    return make_store(source, guide_folder, tmp_path_factory.mktemp("rows") / "store", store_dtype="float32")


@pytest.fixture(scope="module")
def live(store: GuideStore, guide_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The guide in every step; the student is the guide's first layer."""
    return run_with_guide(store, guide_folder, guide_folder, tmp_path_factory.mktemp("live"), keep_layers=(0,))


def test_store_trains_as_the_live_guide_does(live: Run, store: GuideStore, guide_folder: Path, tmp_path: Path) -> None:
    found = run_with_store(store, guide_folder, tmp_path / "student", keep_layers=(0,))
    loss, weights = difference(found, live, "fp32 store")
    assert loss < 1e-4
    assert weights < 0.01


def test_store_of_half_precision_stays_near_the_live_guide(
    live: Run, source: Path, guide_folder: Path, tmp_path: Path
) -> None:
    store = make_store(source, guide_folder, tmp_path / "store")
    found = run_with_store(store, guide_folder, tmp_path / "student", keep_layers=(0,))
    loss, weights = difference(found, live, "fp16 store")
    assert loss < 0.1
    assert weights < 0.2


def test_store_trains_as_the_live_guide_does_with_different_tokenizers(
    foreign_student: Path, source: Path, guide_folder: Path, tmp_path: Path
) -> None:
    store = make_store(
        source, guide_folder, tmp_path / "store", store_dtype="float32", decode_with=str(foreign_student)
    )
    options = {"max_length": 12}
    expected = run_with_guide(store, guide_folder, foreign_student, tmp_path / "live", **options)
    found = run_with_store(store, foreign_student, tmp_path / "student", **options)
    loss, weights = difference(found, expected, "fp32 store of decoded texts")
    assert loss < 1e-4
    assert weights < 0.01
