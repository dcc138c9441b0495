import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gistfast

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for folder in ("gistfast", "kernels", "cli") for path in (ROOT / folder).rglob("*.py"))
SOURCES = sorted({path.resolve() for path in MODULES})


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module)
    return found


@pytest.mark.parametrize("name", ["kernels", "cli"])
def test_folder_is_linked_into_the_package_and_is_no_package_itself(name: str) -> None:
    link = ROOT / "gistfast" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.parametrize("name", ["kernels", "cli"])
def test_link_is_committed_as_a_link(name: str) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--stage", f"gistfast/{name}"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    # 120000 is git's mode for a symbolic link.
    assert listed.stdout.startswith("120000 ")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_imports_the_bare_folders(path: Path) -> None:
    assert not {name for name in imports_of(path) if name.split(".")[0] in ("kernels", "cli")}


def test_imports_point_from_cli_to_package_to_kernels() -> None:
    for path in SOURCES:
        folder = path.relative_to(ROOT).parts[0]
        ours = {name for name in imports_of(path) if name.split(".")[0] == "gistfast"}
        if folder == "kernels":
            allowed = ("gistfast.kernels", "gistfast.errors")
            assert all(name.startswith(allowed) for name in ours), path
        # What `python -m gistfast` runs is the command.
        if folder == "gistfast" and path.name != "__main__.py":
            assert not any(name.startswith("gistfast.cli") for name in ours), path


@pytest.mark.parametrize(
    ("folder", "known"),
    [
        ("rows", set()),
        ("models", set()),
        ("students", {"models", "store"}),
        ("losses", {"kernels", "store"}),
        ("batches", {"neighbours", "store"}),
        ("evaluation", {"store"}),
    ],
)
def test_folder_knows_only_what_it_is_made_of(folder: str, known: set[str]) -> None:
    folders = {path.name for path in (ROOT / "gistfast").iterdir() if path.is_dir()}
    imports = {name for path in (ROOT / "gistfast" / folder).glob("*.py") for name in imports_of(path)}
    found = {name.split(".")[1] for name in imports if name.startswith("gistfast.")} & folders
    assert found <= {folder, *known}


def test_importing_gistfast_loads_nothing_heavy() -> None:
    code = (
        "import sys, gistfast, gistfast.settings.stages, gistfast.progress\n"
        "print({'torch', 'transformers', 'datasets', 'pyarrow', 'numpy', 'faiss'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_public_names_load_and_are_all_listed() -> None:
    assert dir(gistfast) == sorted([*gistfast.__all__, "__version__"])
    for name in gistfast.__all__:
        assert getattr(gistfast, name).__doc__, name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'GuideShop'"):
        gistfast.GuideShop  # noqa: B018


def test_nothing_of_ours_unpickles() -> None:
    for path in SOURCES:
        assert not {"pickle", "dill", "joblib"} & imports_of(path), path
        assert "torch.load(" not in path.read_text(encoding="utf-8"), path


def test_files_stay_short() -> None:
    for path in SOURCES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= (400 if path.parent.name == "kernels" else 300), f"{path}: {lines} lines"


def test_wheel_ships_what_the_quickstart_reads() -> None:
    demo = ROOT / "gistfast" / "demo"
    assert (demo / "wordnet.parquet").stat().st_size < 2 * 2**20
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in (demo / "NOTICE").read_text(encoding="utf-8")
