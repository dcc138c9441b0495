"""Models from the hub: what is downloaded of them, and what is said when they are not to be had."""

from pathlib import Path

from gistfast.errors import ModelError, first_line

# Weights of other frameworks, and pickles, stay where they are.
FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
FOLDERS_LEFT_OUT = ["onnx/*", "openvino/*"]


def download(name: str, *, revision: str | None = None, with_code: bool = False) -> Path:
    """The folder that a model of the hub was downloaded to, or was before; its name is the commit.

    Args:
        name: The hub id.
        revision: Branch, tag or commit.
        with_code: Whether to bring Python files, too.

    Raises:
        ModelError: When there is no such model or revision, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [*FILES, "*.py"] if with_code else FILES
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=FOLDERS_LEFT_OUT)
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(_refusal(error, name, revision)) from error


def _refusal(error: Exception, name: str, revision: str | None) -> str:
    from huggingface_hub import errors

    # A gated repository is also one that is not found: the narrower kind comes first.
    refusals: dict[type[Exception], str] = {
        errors.HFValidationError: f"{name!r} is neither a folder nor a hub id: give one of the two",
        errors.GatedRepoError: f"{name} asks for an agreement: accept it on the hub and run `hf auth login`",
        errors.RepositoryNotFoundError: f"{name} is neither a folder nor a model on the hub: "
        "check the name, or run `hf auth login` for a private one",
        errors.RevisionNotFoundError: f"{name} has no revision {revision!r} on the hub: check its name",
        errors.LocalEntryNotFoundError: f"{name} is not a folder, and the hub cannot be reached: "
        "check the path, or the connection",
    }
    for kind, refusal in refusals.items():
        if isinstance(error, kind):
            return refusal
    return f"{name} cannot be fetched from the hub: {first_line(error)}: try again"
