from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from gistfast.guides.guide import load_guide

# What processors compute in by default differs.
exact = partial(load_guide, dtype="float32")

TEXTS = [
    "river",
    "A large natural stream of water, larger than a creek; the river was navigable for miles.",
    "Größe 大きさ",
    "to be or not to be " * 6,
    "a bowed stringed instrument",
    "food made from dough of flour and water, usually raised and baked",
]
EOS = "<|endoftext|>"
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
DECODERS: dict[str, Any] = {
    "llama": lambda size: LlamaModel(LlamaConfig(vocab_size=size, **SMALL)),
    "qwen2": lambda size: Qwen2Model(Qwen2Config(vocab_size=size, **SMALL)),
    "qwen3": lambda size: Qwen3Model(Qwen3Config(vocab_size=size, head_dim=8, **SMALL)),
}


def tokenizer_of(side: str, *, ends_with_eos: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as decoders have, that pads on one side and ends each text with a token or not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[EOS, "<|pad|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if ends_with_eos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token="<|pad|>", padding_side=side, model_max_length=128
    )


def decoder_folder(folder: Path, kind: str, side: str, *, ends_with_eos: bool = True) -> str:
    torch.manual_seed(0)
    tokenizer = tokenizer_of(side, ends_with_eos=ends_with_eos)
    DECODERS[kind](len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def last_token_vectors(folder: str, texts: list[str], max_length: int = 128) -> "np.ndarray[Any, Any]":
    """Straight from transformers, one text at a time: no padding anywhere."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    vectors = []
    with torch.inference_mode():
        for text in texts:
            tokens = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
            vectors.append(torch.nn.functional.normalize(model(**tokens).last_hidden_state[0, -1], dim=0))
    return torch.stack(vectors).numpy()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", DECODERS)
def test_batches_of_unequal_length_give_the_vectors_of_single_texts(tmp_path: Path, kind: str, side: str) -> None:
    folder = decoder_folder(tmp_path / kind, kind, side)
    expected = last_token_vectors(folder, TEXTS)
    for tokens_per_batch in (100, 100_000):
        guide = exact(folder, pooling="last", tokens_per_batch=tokens_per_batch)
        np.testing.assert_allclose(guide.embed(TEXTS, "query"), expected, atol=5e-6)
    assert guide.info.pooling == "lasttoken"


@pytest.mark.parametrize("ends_with_eos", [True, False])
def test_end_of_text_is_where_the_tokenizer_puts_it_also_when_cut(tmp_path: Path, ends_with_eos: bool) -> None:
    folder = decoder_folder(tmp_path / "model", "qwen3", "left", ends_with_eos=ends_with_eos)
    ids = AutoTokenizer.from_pretrained(folder)(TEXTS[1], truncation=True, max_length=6)["input_ids"]
    assert (ids[-1] == 0) is ends_with_eos
    assert len(ids) == 6
    guide = exact(folder, pooling="last", max_length=6)
    np.testing.assert_allclose(guide.embed(TEXTS, "query"), last_token_vectors(folder, TEXTS, 6), atol=5e-6)


def test_instruction_stands_before_queries_alone(tmp_path: Path) -> None:
    encoder = modules.Transformer(decoder_folder(tmp_path / "plain", "qwen3", "left"))
    prompt = "Instruct: find the definition\nQuery:"
    model = SentenceTransformer(
        modules=[encoder, modules.Pooling(32, "lasttoken"), modules.Normalize()],
        device="cpu",
        prompts={"query": prompt, "document": ""},
    )
    model.save(str(tmp_path / "model"))
    guide = exact(str(tmp_path / "model"))
    assert (guide.info.query_prompt, guide.info.document_prompt) == (prompt, "")
    for role, before in (("query", prompt), ("document", "")):
        expected = last_token_vectors(str(tmp_path / "plain"), [before + text for text in TEXTS])
        np.testing.assert_allclose(guide.embed(TEXTS, role), expected, atol=5e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["weightedmean", "mean", "mean_sqrt_len", "max", "cls"])
def test_other_poolings_of_decoders_leave_padding_out(tmp_path: Path, pooling: Any, side: str) -> None:
    guide = exact(decoder_folder(tmp_path / "model", "qwen3", side), pooling=pooling)
    alone = np.concatenate([guide.embed([text], "query") for text in TEXTS])
    np.testing.assert_allclose(guide.embed(TEXTS, "query"), alone, atol=5e-6)
