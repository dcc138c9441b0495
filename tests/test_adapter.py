import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForSequenceClassification

from gistfast.errors import DependencyError, ModelError
from gistfast.guides.guide import load_guide
from gistfast.models.folder import model_folder
from gistfast.models.pretrained import load_sentence_transformer
from gistfast.students.student import load_student

peft: Any = pytest.importorskip("peft")

# peft asks transformers under the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TEXTS = ["river", "a bowed stringed instrument", "to be or not to be " * 20]


def lora(**options: Any) -> Any:
    """An adapter whose weights are random instead of zero."""
    return peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False, **options)


@pytest.fixture(scope="module")
def base(tiny_student: Path) -> Path:
    return tiny_student.parent / "encoder"


@pytest.fixture(scope="module")
def adapted(base: Path) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(AutoModel.from_pretrained(base), lora()).eval()


@pytest.fixture(scope="module")
def adapter(adapted: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapted_transformer(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers folder whose first module is an adapter."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("whole") / "model"
    encoder = modules.Transformer(str(base), max_seq_length=24)
    model = SentenceTransformer(modules=[encoder, modules.Pooling(32, "mean")], device="cpu", prompts={"query": "q: "})
    model.add_adapter(lora())
    model.save(str(folder))
    return folder


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_plain_adapter_gives_what_peft_gives(adapter: Path, adapted: Any, base: Path) -> None:
    vectors = load_guide(str(adapter), pooling="cls", dtype="float32").embed(TEXTS, "query")
    assert np.abs(vectors - load_guide(str(base), pooling="cls").embed(TEXTS, "query")).max() > 0.01
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.inference_mode():
        for text, vector in zip(TEXTS, vectors, strict=True):
            tokens = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
            expected = torch.nn.functional.normalize(adapted(**tokens).last_hidden_state[:, 0])
            np.testing.assert_allclose(vector, expected[0].numpy(), atol=2e-6)


def test_adapter_within_sentence_transformers_gives_what_it_gives_there(adapted_transformer: Path) -> None:
    guide = load_guide(str(adapted_transformer), dtype="float32")
    peer = SentenceTransformer(str(adapted_transformer), device="cpu")
    expected = peer.encode(TEXTS, prompt_name="query", normalize_embeddings=True)
    np.testing.assert_allclose(guide.embed(TEXTS, "query"), expected, atol=2e-6)
    assert (guide.info.query_prompt, guide.info.max_length, guide.info.pooling) == ("q: ", 24, "mean")


def test_adapter_with_its_texts_in_one_row_gives_the_same(adapter: Path) -> None:
    padded, unpadded = (
        load_guide(str(adapter), pooling="cls", dtype="float32", device="cpu", attention=way)  # type: ignore[arg-type]
        for way in ("padded", "unpadded")
    )
    np.testing.assert_allclose(unpadded.embed(TEXTS, "query"), padded.embed(TEXTS, "query"), atol=2e-6)


def test_first_module_may_lie_in_a_folder_of_its_own(adapted_transformer: Path, tmp_path: Path) -> None:
    folder = copy_of(adapted_transformer, tmp_path / "model")
    listed = json.loads((folder / "modules.json").read_text())
    listed[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "0_Transformer").mkdir()
    for path in [*folder.glob("adapter*"), *folder.glob("tokenizer*"), folder / "sentence_bert_config.json"]:
        path.rename(folder / "0_Transformer" / path.name)
    expected = load_guide(str(adapted_transformer)).embed(TEXTS, "query")
    np.testing.assert_allclose(load_guide(str(folder)).embed(TEXTS, "query"), expected, atol=2e-6)


def test_adapter_of_a_model_with_a_head_fits_its_encoder(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    BertForSequenceClassification(BertConfig.from_pretrained(base)).save_pretrained(tmp_path / "base")
    headed = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(headed, lora(task_type="SEQ_CLS")).eval()
    model.save_pretrained(tmp_path / "adapter")
    guide = load_guide(str(tmp_path / "adapter"), pooling="cls", dtype="float32")
    tokens = AutoTokenizer.from_pretrained(base)("river", return_tensors="pt")
    with torch.inference_mode():
        hidden = headed.bert(**tokens).last_hidden_state[:, 0]
    expected = torch.nn.functional.normalize(hidden).numpy()
    np.testing.assert_allclose(guide.embed(["river"], "query"), expected, atol=2e-6)


def test_tokenizer_beside_the_adapter_comes_first(adapter: Path, base: Path, tmp_path: Path) -> None:
    folder = copy_of(adapter, tmp_path / "adapter")
    assert model_folder(str(folder)).tokenizer_hash() == model_folder(str(base)).tokenizer_hash()
    AutoTokenizer.from_pretrained(base, model_max_length=9).save_pretrained(folder)
    own = model_folder(str(folder))
    assert own.tokenizer_hash() != model_folder(str(base)).tokenizer_hash()
    assert load_sentence_transformer(own, pooling="mean", device="cpu").max_seq_length == 9


def test_hash_covers_adapter_and_base_and_not_where_they_are(adapter: Path, base: Path, tmp_path: Path) -> None:
    moved_base, moved = copy_of(base, tmp_path / "base"), copy_of(adapter, tmp_path / "adapter")
    settings = json.loads((moved / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(moved_base)
    (moved / "adapter_config.json").write_text(json.dumps(settings))
    before = model_folder(str(adapter)).weights_hash()
    assert model_folder(str(moved)).weights_hash() == before
    hashes = {before, model_folder(str(base)).weights_hash()}
    for path in (moved / "adapter_model.safetensors", moved_base / "model.safetensors"):
        weights = bytearray(path.read_bytes())
        weights[-1] ^= 1
        path.write_bytes(weights)
        hashes.add(model_folder(str(moved)).weights_hash())
    settings["lora_alpha"] = 99
    (moved / "adapter_config.json").write_text(json.dumps(settings))
    hashes.add(model_folder(str(moved)).weights_hash())
    assert len(hashes) == 5


def test_adapter_is_a_student_that_is_saved_as_a_whole_model(adapted_transformer: Path, tmp_path: Path) -> None:
    student = load_student(str(adapted_transformer), device="cpu")
    assert all(weight.requires_grad for weight in student.parameters())
    student.save(str(tmp_path / "student"))
    saved = tmp_path / "student"
    assert (saved / "model.safetensors").is_file()
    assert not (saved / "adapter_config.json").exists()
    assert "gistfast-" not in "".join(path.read_text() for path in saved.rglob("*.json"))
    again = SentenceTransformer(str(saved), device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS), student.encode(TEXTS), atol=2e-6)


def change_settings(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_adapter_whose_base_is_missing_is_refused(adapter: Path, tmp_path: Path) -> None:
    folder = copy_of(adapter, tmp_path / "adapter")
    change_settings(folder, base_model_name_or_path="/nowhere/base")
    with pytest.raises(ModelError, match=r"is an adapter of /nowhere/base, which cannot be had: .* is not a folder"):
        model_folder(str(folder))


@pytest.mark.parametrize("contents", ["not json", "[]", "{}", '{"base_model_name_or_path": null}'])
def test_adapter_that_names_no_base_is_refused(adapter: Path, tmp_path: Path, contents: str) -> None:
    folder = copy_of(adapter, tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(contents)
    with pytest.raises(ModelError, match="does not say which model the adapter was trained on"):
        model_folder(str(folder))


def test_adapter_of_an_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    folder = copy_of(adapter, tmp_path / "adapter")
    for base in (adapter, folder):
        change_settings(folder, base_model_name_or_path=str(base))
        with pytest.raises(ModelError, match="itself an adapter: merge that one first"):
            model_folder(str(folder))


def test_pickled_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    folder = copy_of(adapter, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickles only, expected safetensors"):
        model_folder(str(folder))


def test_weights_of_another_base_are_refused(adapter: Path, tmp_path: Path) -> None:
    folder = copy_of(adapter, tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("encoder.layer", "layers"): value for name, value in weights.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="has no weights for the layers of its base that it names"):
        load_guide(str(folder), pooling="mean")


def test_layers_that_the_base_lacks_are_refused_in_one_line(adapter: Path, tmp_path: Path) -> None:
    folder = copy_of(adapter, tmp_path / "adapter")
    change_settings(folder, target_modules=["q_proj"])
    with pytest.raises(ModelError, match=r"does not load as a model: .*q_proj") as refusal:
        load_guide(str(folder), pooling="mean")
    assert "\n" not in str(refusal.value)


def test_adapter_that_cannot_be_merged_is_refused(adapter: Path, tmp_path: Path) -> None:
    folder = copy_of(adapter, tmp_path / "adapter")
    settings = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2)
    settings.base_model_name_or_path = json.loads((folder / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    settings.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"is an adapter of kind .*PREFIX_TUNING, expected LoRA"):
        load_guide(str(folder), pooling="mean")


def test_missing_peft_names_the_extra(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DependencyError, match=r"pip install gistfast\[lora\]"):
        load_guide(str(adapter), pooling="mean")


def test_plain_adapter_needs_a_pooling(adapter: Path) -> None:
    with pytest.raises(ModelError, match="says nothing of its pooling"):
        load_guide(str(adapter))
