"""Small encoders of all kinds of attention, and texts for them, padded and in one row."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from gistfast.models import packed_attention
from gistfast.students.input import InputForm, TextSet, input_form, text_set
from gistfast.students.packed import pack
from gistfast.students.student import set_dropout
from gistfast.students.tokenising import tokenise
from gistfast.training.passes import PackedPasses

# From one word to more words than a student sees.
TEXTS = ["oak", "a motor vehicle", "so many words that they have to be cut " * 20, "judge", "flat land " * 9, "river"]
SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": {"max_position_embeddings": 32},
    # Positions are counted from behind that of padding.
    "XLMRoberta": {"max_position_embeddings": 34, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 32},
    # Two layers of three see seven tokens to either side.
    "ModernBert": {"local_attention": 14, "global_attn_every_n_layers": 3, "pad_token_id": 0},
    # Causal, with one head of keys for two of queries.
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0},
    # Causal, and tokens see six before them.
    "Mistral": {"num_key_value_heads": 4, "sliding_window": 7, "pad_token_id": 0},
}


def make_encoder(name: str, folder: Path, tokenizer: Any, **config: Any) -> Path:
    """An encoder with random weights that are large enough for attention to be uneven."""
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}Config")(vocab_size=len(tokenizer), **SIZE | config)
    model = getattr(transformers, f"{name}Model")(made)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_t5(folder: Path, guide_folder: Path) -> Path:
    """An encoder whose attention has a bias for positions, with the guide's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(guide_folder)
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def let_texts_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let packed attention on a CPU take all texts of a row for one."""
    text_by_text = packed_attention._text_by_text

    def one_text(query: Tensor, key: Tensor, value: Tensor, texts: Any, *rest: Any) -> Tensor:
        return text_by_text(query, key, value, texts._replace(bounds=texts.bounds[[0, -1]]), *rest)

    monkeypatch.setattr(packed_attention, "_text_by_text", one_text)


def make_student(
    name: str, folder: Path, tokenizer: Any, pooling: Any, config: Any, device: str
) -> SentenceTransformer:
    """A student with one of the encoders, without dropout."""
    encoder = make_encoder(name, folder, tokenizer, **config)
    model = SentenceTransformer(
        modules=[Transformer(str(encoder), max_seq_length=32), Pooling(32, pooling)], device=device
    ).train()
    set_dropout(model, 0.0)
    return model


def forms(model: SentenceTransformer, texts: list[str], prompt: str = "") -> tuple[tuple[InputForm, TextSet], ...]:
    """What the student takes, padded and in one row, with the passes over the texts."""
    form = input_form(model, [prompt])
    tokens, sizes = tokenise(model, texts, prompt)
    order = np.zeros(len(texts), np.int64)
    padded = text_set(tokens, sizes, np.array([(0, 2, 0), (2, len(texts), 0)]))
    in_rows = text_set(tokens, sizes, PackedPasses(40).cut(sizes, order))
    return (form, padded), (pack(model, form), in_rows)
