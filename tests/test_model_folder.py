import json
import shutil
from pathlib import Path

import pytest

from gistfast.errors import ModelError
from gistfast.models.folder import model_folder


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_local_folder_is_named_by_its_last_two_parts(tiny_student: Path) -> None:
    folder = model_folder(str(tiny_student))
    assert folder.name == f"{tiny_student.parent.name}/student"
    assert folder.revision is None
    assert folder.is_sentence_transformer


def test_revision_of_a_local_folder_is_refused(tiny_student: Path) -> None:
    with pytest.raises(ModelError, match="is a folder, which has no revision 'main': leave it out or give a hub id"):
        model_folder(str(tiny_student), revision="main")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"])
def test_missing_folder_is_refused_without_asking_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="is not a folder: give the folder of a model or a hub id"):
        model_folder(name)


def test_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelError, match="is not a folder"):
        model_folder(str(file))


def test_model_of_the_hub_keeps_its_name_and_commit(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = copy_of(tiny_student, tmp_path / "0123abcd")
    monkeypatch.setattr("gistfast.models.folder.download", lambda name, **options: snapshot)
    folder = model_folder("org/model", revision="main")
    assert (folder.name, folder.revision, folder.path) == ("org/model", "0123abcd", snapshot)


def test_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a model: found neither modules\.json nor config\.json"):
        model_folder(str(tmp_path))


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"found no \*\.safetensors"):
        model_folder(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="pickles only, expected safetensors"):
        model_folder(str(tmp_path))


def test_pickled_weights_of_a_later_module_are_refused(tiny_student: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_student, tmp_path / "model")
    listed = json.loads((folder / "modules.json").read_text())
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*listed, dense]))
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="2_Dense has its weights as pickles only"):
        model_folder(str(folder))


def test_modules_outside_the_folder_are_refused(tiny_student: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_student, tmp_path / "model")
    (folder / "modules.json").write_text(json.dumps([{"path": "../elsewhere"}]))
    with pytest.raises(ModelError, match="leads out of the model's folder"):
        model_folder(str(folder))


@pytest.mark.parametrize("contents", ["not json", '"text"', "[1]"])
def test_damaged_module_list_is_refused(tiny_student: Path, tmp_path: Path, contents: str) -> None:
    folder = copy_of(tiny_student, tmp_path / "model")
    (folder / "modules.json").write_text(contents)
    with pytest.raises(ModelError, match=r"has a damaged modules\.json"):
        model_folder(str(folder))


def test_hashes_follow_the_files(tiny_student: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_student, tmp_path / "model")
    before, copied = model_folder(str(tiny_student)), model_folder(str(folder))
    assert copied.weights_hash() == before.weights_hash()
    assert copied.tokenizer_hash() == before.tokenizer_hash()
    with (folder / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert copied.weights_hash() == before.weights_hash()
    assert copied.tokenizer_hash() != before.tokenizer_hash()
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert copied.weights_hash() != before.weights_hash()
