"""Where the pages of the package lie: recipes and sweeps, in a checkout or in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from fedllm.config.suggest import nearest
from fedllm.errors import FedError

SUFFIXES = {".yaml", ".yml"}


def folders(kind: str = "recipes") -> list[Path]:
    """Inside the installed package, and beside it in a checkout, which wins."""
    package = Path(__file__).resolve().parents[1]
    return [folder for folder in (package / kind, package.parent / kind) if folder.is_dir()]


def pages(kind: str = "recipes") -> dict[str, Path]:
    """Every page by its name, in alphabetical order."""
    found = {page.stem: page for folder in folders(kind) for page in folder.glob("*.yaml")}
    return dict(sorted(found.items()))


def find(name: str, kind: str = "recipes", said: str = "recipe=") -> Path:
    """A page: a path to a YAML file, or a name in the package's folder.

    Args:
        kind: ``recipes`` or ``sweeps``.
        said: how the caller's user names it.

    Raises:
        FedError: there is none, with the nearest name.
    """
    if Path(name).suffix in SUFFIXES:
        if not Path(name).is_file():
            raise FedError(f"{said}{name}: there is no such file.")
        return Path(name)
    known = pages(kind)
    if name in known:
        return known[name]
    written = next((f"{name}{suffix}" for suffix in SUFFIXES if Path(f"{name}{suffix}").is_file()), None)
    if written:
        raise FedError(f"{said}{name}: a page of your own is a path with its ending. Did you mean {written}?")
    path = "A page of your own is a path that ends in .yaml. " if Path(name).exists() else ""
    raise FedError(f"{said}{name}: {path}{nearest(name, known, kind.removesuffix('s'))}")
