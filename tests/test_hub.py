from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from gistfast.errors import ModelError
from gistfast.models.hub import download


def response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            errors.LocalEntryNotFoundError("Got: ConnectError\nmore"),
            "org/model is not a folder, and the hub cannot be",
        ),
        (errors.HFValidationError("bad"), "'org/model' is neither a folder nor a hub id"),
        (
            errors.RepositoryNotFoundError("404", response=response(404)),
            "neither a folder nor a model on the hub",
        ),
        (errors.GatedRepoError("403", response=response(403)), "asks for an agreement: accept it on the hub"),
        (errors.RevisionNotFoundError("404", response=response(404)), "has no revision 'v9' on the hub"),
        (
            errors.HfHubHTTPError("502 bad gateway\nid 7", response=response(502)),
            "fetched from the hub: 502 bad gateway:",
        ),
        (OSError("no route"), "cannot be fetched from the hub: no route: try again"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(error: Exception, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=line) as refusal:
        download("org/model", revision="v9")
    assert "\n" not in str(refusal.value)


def test_unreachable_hub_is_named() -> None:
    with pytest.raises(ModelError, match="the hub cannot be reached: check the path, or the connection"):
        download("nobody/nothing")


@pytest.mark.parametrize(("with_code", "brought"), [(False, False), (True, True)])
def test_code_is_downloaded_only_when_trusted(
    with_code: bool, brought: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        seen.update(options)
        return str(tmp_path / "0123abcd")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert download("org/model", with_code=with_code).name == "0123abcd"
    assert ("*.py" in seen["allow_patterns"]) is brought
    assert not any(pattern.endswith((".bin", ".pt", ".pkl")) for pattern in seen["allow_patterns"])
