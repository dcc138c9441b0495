import copy
import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from torch import nn

from gistfast.errors import ConfigError, ModelError
from gistfast.students.layers import keep_transformer_layers
from gistfast.students.student import load_student, set_dropout

TEXTS = ["a dog runs in the park", "interest rates rose"]
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 30522}
DEBERTA = SIZES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
DISTILBERT = {"dim": 32, "n_heads": 2, "hidden_dim": 48, "n_layers": 4}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_heads": 2, "num_layers": 4, "vocab_size": 30522}
MODERNBERT = SIZES | {"pad_token_id": 0, "global_attn_every_n_layers": 2, "local_attention": 4}
ENCODERS = {
    "Bert": SIZES,
    "Roberta": SIZES,
    "XLMRoberta": SIZES,
    "Electra": SIZES | {"embedding_size": 32},
    "MPNet": SIZES,
    "DistilBert": DISTILBERT,
    "DebertaV2": DEBERTA,
    "ModernBert": MODERNBERT,
    "T5Encoder": T5,
}


def encoder(architecture: str, guide_folder: Path, folder: Path) -> SentenceTransformer:
    """An encoder of four layers with random weights, and the guide's tokenizer."""
    config_class = getattr(transformers, architecture.removesuffix("Encoder") + "Config")
    model_class = getattr(transformers, architecture + "Model")
    options = ENCODERS[architecture]
    layers = {} if "num_layers" in options or "n_layers" in options else {"num_hidden_layers": 4}
    torch.manual_seed(0)
    model_class(config_class(**options, **layers)).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(guide_folder).save_pretrained(folder)
    module = Transformer(str(folder), max_seq_length=16)
    return SentenceTransformer(modules=[module, Pooling(32, "mean")], device="cpu")


def without_layers(model: SentenceTransformer, layers: list[int]) -> SentenceTransformer:
    """The same model with the other layers taken out of its lists, as they are."""
    cut = copy.deepcopy(model)
    for parent in list(cut.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == 4:
                setattr(parent, name, nn.ModuleList(child[layer] for layer in layers))
    cut.config.num_hidden_layers = len(layers)
    return cut


@pytest.mark.parametrize("architecture", ENCODERS)
def test_cut_encoder_computes_what_the_kept_layers_compute_and_saves(
    architecture: str, guide_folder: Path, tmp_path: Path
) -> None:
    model = encoder(architecture, guide_folder, tmp_path / "encoder")
    layers = [0, 3]
    expected = without_layers(model, layers).encode(TEXTS)
    keep_transformer_layers(model, layers)
    model.save(str(tmp_path / "cut"))
    saved = SentenceTransformer(str(tmp_path / "cut"), device="cpu")
    assert model.config.num_hidden_layers == saved.config.num_hidden_layers == 2
    torch.testing.assert_close(model.encode(TEXTS), expected)
    torch.testing.assert_close(saved.encode(TEXTS), expected)


@pytest.mark.parametrize("architecture", ENCODERS)
def test_without_dropout_training_mode_computes_the_same_each_time(
    architecture: str, guide_folder: Path, tmp_path: Path
) -> None:
    model = encoder(architecture, guide_folder, tmp_path / "encoder").train()
    features = model.preprocess(TEXTS)

    def embed() -> torch.Tensor:
        return model(dict(features))["sentence_embedding"].detach()

    set_dropout(model, 0.5)
    assert not torch.equal(embed(), embed())
    set_dropout(model, 0.0)
    assert torch.equal(embed(), embed())


def test_real_model_keeps_its_first_layers(guide_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gistfast.students.layers"):
        student = load_student(str(guide_folder), keep_layers=[0, 1, 2], max_length=64, device="cpu")
    assert "kept layers 0,1,2 of 6" in caplog.text
    assert student.config.num_hidden_layers == 3
    assert student.max_seq_length == 64
    guide = SentenceTransformer(str(guide_folder), device="cpu")
    kept = student.transformers_model.encoder.layer[2].state_dict()
    for name, weight in guide.transformers_model.encoder.layer[2].state_dict().items():
        assert torch.equal(kept[name], weight)


def test_first_layer_that_others_lean_on_cannot_go(guide_folder: Path, tmp_path: Path) -> None:
    # T5 keeps its table of relative positions in the first layer.
    model = encoder("T5Encoder", guide_folder, tmp_path)
    with pytest.raises(ModelError, match="does not work with layers 1,2 alone"):
        keep_transformer_layers(model, [1, 2])


def test_layers_that_share_weights_cannot_go(guide_folder: Path, tmp_path: Path) -> None:
    config = transformers.AlbertConfig(**SIZES, embedding_size=32, num_hidden_layers=4)
    transformers.AlbertModel(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(guide_folder).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="AlbertModel keeps no list of its 4 layers"):
        load_student(str(tmp_path), pooling="mean", keep_layers=[0, 1], device="cpu")


@pytest.mark.parametrize("layers", [[], [0, 6], [-1], [2, 1], [1, 1]])
def test_layers_that_are_not_there_are_refused(guide_folder: Path, layers: list[int]) -> None:
    with pytest.raises(ConfigError, match="--keep-layers must be ascending numbers from 0 to 5"):
        load_student(str(guide_folder), keep_layers=layers, device="cpu")


def test_student_without_layers_says_so() -> None:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)], device="cpu")
    with pytest.raises(ModelError, match="no transformer layers"):
        keep_transformer_layers(model, [0])


def test_folder_that_is_not_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a model"):
        load_student(str(tmp_path), device="cpu")


def test_unreachable_hub_is_one_line() -> None:
    with pytest.raises(ModelError, match="hub cannot be reached") as caught:
        load_student("gistfast-tests/no-such-model", device="cpu")
    assert "\n" not in str(caught.value)


def test_dropout_of_a_student_that_has_none_is_refused(tiny_student: Path, tmp_path: Path) -> None:
    tokenizer = SentenceTransformer(str(tiny_student), device="cpu").tokenizer
    static = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")
    static.save(str(tmp_path))
    with pytest.raises(ConfigError, match=r"--dropout 0.1: the student has no dropout: leave it out"):
        load_student(str(tmp_path), dropout=0.1, device="cpu")
    load_student(str(tmp_path), dropout=0.0, device="cpu")


def test_dropout_is_written_into_the_saved_configuration(tiny_student: Path, tmp_path: Path) -> None:
    student = load_student(str(tiny_student), dropout=0.25, device="cpu")
    student.save(str(tmp_path))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["hidden_dropout_prob"] == saved["attention_probs_dropout_prob"] == 0.25
