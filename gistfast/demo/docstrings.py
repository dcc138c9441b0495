"""Docstrings of Python files: English texts of every length that are there wherever Python is."""

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path


def docstrings_in(path: Path) -> Iterator[str]:
    """The docstrings of a file's module, classes and functions; none of a file that is no Python of this version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield text
