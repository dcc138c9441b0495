"""Two processes that share their candidates take the steps of one process on the joint batch.

The tests start this file as a script, once for each process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import Tensor, distributed, nn

from gistfast import CachedGISTLoss, GISTLoss
from gistfast.errors import ShapeError
from gistfast.stages.precompute import precompute
from gistfast.store import GuideStore
from gistfast.students.student import set_dropout

RANKS = 2
COLUMNS = ("anchor", "positive", "negative_1", "negative_2")
# The first half goes to rank 0. "automobile" is an anchor there, and a positive and a negative on rank 1;
# "a stringed toy" and "flour of wheat" are positives or negatives of both; "bank" comes twice on rank 1.
ROWS = [
    ("car", "a motor vehicle with four wheels", "a vehicle with two wheels", "a boat with sails"),
    ("automobile", "a motor vehicle with four wheels", "a toy on wheels", "a road for vehicles"),
    ("violin", "a bowed stringed instrument", "a brass instrument", "a stringed toy"),
    ("bread", "food made from dough of flour and water", "cake with sugar", "flour of wheat"),
    ("a carriage with an engine", "automobile", "a stringed toy", "a drink of water"),
    ("powder of grain", "flour of wheat", "automobile", "a crew"),
    ("bank", "a financial institution that accepts deposits", "a payment", "a thief"),
    ("bank", "sloping land beside a body of water", "a bridge over water", "flat land"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "margin": {"margin": 0.05},
    "relative": {"margin": 0.1, "margin_strategy": "relative", "hard_only": True},
    "from anchors alone": {"margin": 0.05, "contrast_anchors": False, "contrast_positives": False},
    # So far below every score that candidates are dropped by their text alone.
    "identity": {"margin": -3.0},
}
LOSSES: dict[str, Callable[..., nn.Module]] = {
    "plain": GISTLoss,
    "cached": lambda *given, **options: CachedGISTLoss(*given, mini_batch_size=3, **options),
    "tolerant": lambda *given, **options: CachedGISTLoss(*given, mini_batch_size=3, replay_tolerance=1e-9, **options),
    "matryoshka": lambda model, *given, **options: MatryoshkaLoss(model, GISTLoss(model, *given, **options), [32, 8]),
    "cached matryoshka": lambda model, *given, **options: MatryoshkaLoss(
        model, CachedGISTLoss(model, *given, mini_batch_size=3, **options), [32, 8]
    ),
}
CASES = [
    *((loss, options, columns) for loss in ("plain", "cached") for options in OPTIONS for columns in (2, 4)),
    *((loss, "margin", 4) for loss in ("matryoshka", "cached matryoshka")),
]
Result = dict[str, Tensor]


def student(folder: Path) -> SentenceTransformer:
    """Without dropout, which differs between processes."""
    model = SentenceTransformer(str(folder), device="cpu")
    model.model_card_data.local_files_only = True
    set_dropout(model, 0.0)
    return model


def gradients(
    model: SentenceTransformer, store: GuideStore, case: tuple[str, str, int], rows: slice, *, gather: bool
) -> Result:
    """The loss of some rows of a store, and the gradient on all weights."""
    loss_name, options_name, num_columns = case
    labels = torch.tensor(store.rows)[rows, :num_columns]
    features = [model.preprocess(store.texts.take(ids.numpy())) for ids in labels.T]
    options = {"temperature": 0.1, "gather_across_devices": gather} | OPTIONS[options_name]
    model.zero_grad()
    loss = LOSSES[loss_name](model, store, **options)(features, labels)
    loss.backward()
    found = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return {f"{case} loss": loss.detach().clone(), f"{case} gradient": torch.cat(found).clone()}


def train(model: SentenceTransformer, store: GuideStore, name: str, out: Path, batch_size: int) -> Result:
    """The weights after a few steps in sentence-transformers' trainer."""
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(out),
        max_steps=4,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=0.0,
        dataloader_drop_last=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    loss = LOSSES[name](model, store, temperature=0.1, margin=0.05, gather_across_devices=batch_size < len(ROWS))
    SentenceTransformerTrainer(model, arguments, store.to_dataset("train"), loss=loss).train()
    return {f"{name} weights": torch.cat([weight.detach().flatten() for weight in model.parameters()])}


def refusal(model: SentenceTransformer, store: GuideStore, rows: slice) -> Result:
    """What the loss says to a batch that does not fit another process's, as bytes."""
    with pytest.raises(ShapeError) as caught:
        gradients(model, store, ("plain", "margin", 2), rows, gather=True)
    return {"refusal": torch.tensor(list(str(caught.value).encode()), dtype=torch.uint8)}


def work(rank: int, folder: Path, student_folder: Path) -> None:
    """All that one process of the group does; its results go to a file."""
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    store, other = GuideStore.open(folder / "store"), GuideStore.open(folder / "other")
    half = len(ROWS) // RANKS
    mine = slice(rank * half, (rank + 1) * half)
    model = student(student_folder).double()
    found: Result = {}
    for case in CASES:
        found |= gradients(model, store, case, mine, gather=True)
    found |= {f"unequal {name}": value for name, value in refusal(model, store, slice(half - rank)).items()}
    wrong = other if rank else store
    found |= {f"mixed {name}": value for name, value in refusal(model, wrong, mine).items()}
    for name in ("plain", "cached", "tolerant"):
        found |= train(student(student_folder), store, name, folder / name, half)
    save_file(found, folder / f"rank-{rank}.safetensors")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(guide_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the rows, and another one of the same texts in another order."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, rows in {"store": ROWS, "other": ROWS[::-1]}.items():
        lines = [json.dumps(dict(zip(COLUMNS, row, strict=True))) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        precompute(folder / f"{name}.jsonl", guide=guide_folder, out=folder / name, index="none", device="cpu")
    return folder


@pytest.fixture(scope="module")
def store(folder: Path) -> GuideStore:
    return GuideStore.open(folder / "store")


@pytest.fixture(scope="module")
def ranks(folder: Path, tiny_student: Path) -> list[Result]:
    """What each process found."""
    # What the trainer asks for. The processes meet by a file, so the port is not used.
    group = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder), str(tiny_student)],
            env={**os.environ, **group, **alone, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        said = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, output in zip(processes, said, strict=True):
        assert process.returncode == 0, output
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_averaged_gradient_is_that_of_the_joint_batch(
    ranks: list[Result], store: GuideStore, tiny_student: Path, case: tuple[str, str, int]
) -> None:
    joint = gradients(student(tiny_student).double(), store, case, slice(None), gather=False)
    for name, expected in joint.items():
        average = torch.stack([rank[name] for rank in ranks]).mean(0)
        assert expected.abs().max() > 1e-3
        assert (average - expected).abs().max() <= 1e-6 * expected.abs().max(), name
        # The halves alone give another one.
        halves = [
            gradients(student(tiny_student).double(), store, case, rows, gather=False)[name]
            for rows in (slice(4), slice(4, 8))
        ]
        assert (torch.stack(halves).mean(0) - expected).abs().max() > 1e-2 * expected.abs().max(), name


@pytest.mark.parametrize("name", ["plain", "cached", "tolerant"])
def test_trainer_of_two_processes_takes_the_steps_of_one(
    ranks: list[Result], store: GuideStore, tiny_student: Path, tmp_path: Path, name: str
) -> None:
    begin = torch.cat([weight.detach().flatten() for weight in student(tiny_student).parameters()])
    (expected,) = train(student(tiny_student), store, name, tmp_path, len(ROWS)).values()
    travelled = (expected - begin).abs().max()
    assert travelled > 1e-3
    for rank in ranks:
        assert (rank[f"{name} weights"] - expected).abs().max() <= 1e-4 * travelled


@pytest.mark.parametrize("kind", ["unequal", "mixed"])
def test_batches_that_cannot_be_joined_are_refused_by_every_process(ranks: list[Result], kind: str) -> None:
    for number, rank in enumerate(ranks):
        message = bytes(rank[f"{kind} refusal"].tolist()).decode()
        num_rows = 4 - number if kind == "unequal" else 4
        assert message.startswith(f"this process has {num_rows} rows of 2 columns from ")
        assert "gather_across_devices needs equal batches from one store" in message
        assert "\n" not in message


def test_gathering_in_one_process_is_no_gathering(store: GuideStore, tiny_student: Path) -> None:
    model = student(tiny_student).double()
    found, expected = (gradients(model, store, CASES[0], slice(None), gather=gather) for gather in (True, False))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
