import json
import shutil
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from transformers import AutoTokenizer, MPNetConfig, MPNetModel

from gistfast.errors import ConfigError, ModelError
from gistfast.models.folder import model_folder
from gistfast.models.pretrained import POOLING_MODES, load_sentence_transformer, pick_device


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_truncated_weights_give_one_line(tiny_student: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_student, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="does not load as a model") as refusal:
        load_sentence_transformer(model_folder(str(folder)), device="cpu")
    assert "\n" not in str(refusal.value)


def test_code_of_a_model_runs_only_when_trusted(tiny_student: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_student, tmp_path / "model")
    listed = json.loads((folder / "modules.json").read_text())
    listed[1]["type"] = "modeling.Pooling"
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "modeling.py").write_text("raise SystemExit('code of the model ran')")
    with pytest.raises(ModelError, match="code of its own: read that code, and give --trust-remote-code"):
        load_sentence_transformer(model_folder(str(folder)), device="cpu")


def test_plain_transformer_needs_a_pooling(tiny_student: Path) -> None:
    folder = model_folder(str(tiny_student.parent / "encoder"))
    assert not folder.is_sentence_transformer
    with pytest.raises(ModelError, match=r"give --pooling mean\|cls\|last\|max"):
        load_sentence_transformer(folder, device="cpu")


def test_plain_transformer_with_pooling_is_the_sentence_transformer(tiny_student: Path) -> None:
    plain = load_sentence_transformer(model_folder(str(tiny_student.parent / "encoder")), pooling="mean", device="cpu")
    whole = SentenceTransformer(str(tiny_student), device="cpu")
    assert (plain.encode("a small text") == whole.encode("a small text")).all()


def test_every_pooling_of_sentence_transformers_is_offered() -> None:
    assert set(POOLING_MODES.values()) == set(modules.Pooling.POOLING_MODES)


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [("cls", "cls"), ("last", "lasttoken"), ("max", "max"), ("weightedmean", "weightedmean")],
)
def test_pooling_takes_the_place_of_the_models_own(tiny_student: Path, pooling: str, mode: str) -> None:
    model = load_sentence_transformer(model_folder(str(tiny_student)), pooling=pooling, device="cpu")  # type: ignore[arg-type]
    pool = model[1]
    assert isinstance(pool, modules.Pooling)
    assert pool.pooling_mode == mode
    assert len(model) == 2


def test_length_is_limited_as_asked(tiny_student: Path) -> None:
    model = load_sentence_transformer(model_folder(str(tiny_student)), max_length=5, device="cpu")
    assert model.preprocess(["one two three four five six seven"])["input_ids"].shape == (1, 5)


def test_length_beyond_the_positions_is_refused(tiny_student: Path) -> None:
    with pytest.raises(ModelError, match=r"--max-length is 65, and .* sees 64 tokens: give at most that"):
        load_sentence_transformer(model_folder(str(tiny_student)), max_length=65, device="cpu")


def test_length_of_static_embeddings_cannot_be_limited(tiny_student: Path, tmp_path: Path) -> None:
    tokenizer = SentenceTransformer(str(tiny_student), device="cpu").tokenizer
    static = SentenceTransformer(modules=[modules.StaticEmbedding(tokenizer, embedding_dim=4)], device="cpu")
    static.save(str(tmp_path / "static"))
    with pytest.raises(ModelError, match="static has no limit of tokens to set: leave --max-length out"):
        load_sentence_transformer(model_folder(str(tmp_path / "static")), max_length=5, device="cpu")


def test_positions_that_padding_takes_are_not_counted(tmp_path: Path, guide_folder: Path) -> None:
    config = MPNetConfig(
        vocab_size=30_527,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=34,
    )
    MPNetModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(guide_folder).save_pretrained(tmp_path)
    folder = model_folder(str(tmp_path))
    with pytest.raises(ModelError, match=r"--max-length is 33, and .* sees 32 tokens"):
        load_sentence_transformer(folder, pooling="mean", max_length=33, device="cpu")
    model = load_sentence_transformer(folder, pooling="mean", max_length=32, device="cpu")
    assert model.encode("one " * 50).shape == (8,)


def test_weights_take_the_precision_asked_for(tiny_student: Path) -> None:
    folder = model_folder(str(tiny_student))
    assert load_sentence_transformer(folder, device="cpu").dtype == torch.float32
    assert load_sentence_transformer(folder, dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16


def test_automatic_device_is_one_that_is_there() -> None:
    assert pick_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == "cpu"


@pytest.mark.parametrize(("name", "reason"), [("gpu", "must be auto, cpu, cuda"), ("cuda:99", "CUDA devices here")])
def test_missing_device_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        pick_device(name)
