"""The package around the code: what the wheel carries, what modules are called, and which way they import."""

from __future__ import annotations

import ast
import configparser
import email
import graphlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import fedllm

ROOT = Path(__file__).parents[1]
MACHINE = re.compile(r"(?<![\w.-])/(?:work|root)/|(?<![\w.-])/(?:home|Users)/[\w.-]+")

MAY_IMPORT: dict[str, set[str]] = {
    "fedllm.lowrank": set(),
    "fedllm.errors": set(),
    "fedllm.structure": {"fedllm.errors"},
    "fedllm.core": {"fedllm.errors", "fedllm.lowrank", "fedllm.structure"},
    "fedllm.mean": {"fedllm.core", "fedllm.errors", "fedllm.lowrank"},
    "fedllm.models.submodel": {"fedllm.structure", "fedllm.errors"},
}
"""All that the modules at the bottom may import of this package."""

FOR_ALGORITHMS = {
    "fedllm.algorithms",
    "fedllm.mean",
    "fedllm.models.submodel",
    "fedllm.core",
    "fedllm.structure",
    "fedllm.errors",
    "fedllm.lowrank",
    "fedllm.models.paired",
    "fedllm.models.build",
    "fedllm.models.cnn",
    "fedllm.models.factorized",
    "fedllm.models.flanc",
    "fedllm.models.lowrank_conv",
    "fedllm.models.resnet",
    "fedllm.config.types",
}
NOT_FOR_ALGORITHMS = {"trl", "peft", "transformers", "accelerate", "datasets", "flwr"}


def tracked() -> list[Path]:
    """Every file that git tracks, as it lies in the checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def scripts() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py"]


def normal(name: str) -> str:
    """A distribution's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> dict[str, str]:
    """Distribution -> lower bound, of every dependency and extra in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    return {
        normal(name.partition("[")[0]): bound.partition(",")[0] for name, bound in (line.split(">=") for line in lines)
    }


def module_name(path: Path) -> str:
    """`fedllm/algorithms/__init__.py` is `fedllm.algorithms`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def for_types(node: ast.AST) -> bool:
    """Whether only a type checker reads this part."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(source: str, package: str, known: Iterable[str], *, on_load: bool = False) -> set[str]:
    """Every module that a source names in an import; ``on_load``: outside functions only, where loading runs it.

    ``from fedllm import core`` names ``fedllm.core`` where that is one of the ``known`` modules, else ``fedllm``.
    """
    found: set[str] = set()
    rest: list[ast.AST] = [ast.parse(source)]
    while rest:
        node = rest.pop()
        if not (on_load and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or for_types(node))):
            rest.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
    return found


def imports_of_all(*, on_load: bool = False) -> dict[str, set[str]]:
    """Module of this package -> every module it imports."""
    sources = {module_name(path): path for path in scripts() if path.is_relative_to(ROOT / "fedllm")}
    packages = {n: n if path.stem == "__init__" else n.rpartition(".")[0] for n, path in sources.items()}
    return {n: imported(p.read_text(), packages[n], sources, on_load=on_load) for n, p in sources.items()}


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    return imports_of_all()


def importable() -> dict[str, set[str]]:
    """Top-level folder -> the names that become importable when a script of it is launched by its path."""
    found: dict[str, set[str]] = {}
    for path in scripts():
        folder, *rest = path.relative_to(ROOT).parts
        found.setdefault(folder, set()).add(rest[0].removesuffix(".py"))
    return {folder: names - {"__init__"} for folder, names in found.items()}


def shadowed(names: set[str]) -> set[str]:
    """Those names that a standard-library or an installed third-party module has too."""
    installed = {name for name, owners in packages_distributions().items() if set(owners) != {"fedllm"}}
    return names & (set(sys.stdlib_module_names) | installed)


def test_a_taken_name_is_noticed():
    assert shadowed({"copy", "datasets", "torch", "lowrank"}) == {"copy", "datasets", "torch"}


def test_no_module_has_the_name_of_another_ones():
    folders = importable()
    assert {"core", "lowrank", "algorithms"} <= folders["fedllm"]
    assert {folder: taken for folder, names in folders.items() if (taken := shadowed(names))} == {}


def test_imports_are_read_as_python_reads_them():
    source = "import torch.nn\nfrom fedllm import core, __version__\ndef f():\n    from .mean import pad\n"
    found = imported(source, "fedllm", {"fedllm.core", "fedllm.mean"})
    assert found == {"torch.nn", "fedllm.core", "fedllm", "fedllm.mean"}
    assert found - imported(source, "fedllm", {"fedllm.core"}, on_load=True) == {"fedllm.mean"}


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_the_bottom_imports_only_what_is_below_it(module, imports):
    ours = {name for name in imports[module] if name.split(".")[0] == "fedllm"}
    assert ours <= MAY_IMPORT[module]


def test_algorithms_import_neither_a_trainer_nor_anything_above_them(imports):
    algorithms = {name: found for name, found in imports.items() if name.startswith("fedllm.algorithms")}
    assert len(algorithms) > 5
    for name, found in algorithms.items():
        ours = {m for m in found if m.split(".")[0] == "fedllm" and not m.startswith("fedllm.algorithms.")}
        assert ours <= FOR_ALGORITHMS, name
        assert {m.split(".")[0] for m in found}.isdisjoint(NOT_FOR_ALGORITHMS), name


def test_imports_go_round_in_no_circle():
    """Of those that loading runs; a function may look up at call time what stands above it."""
    graph = imports_of_all(on_load=True)
    order = list(graphlib.TopologicalSorter({m: found & graph.keys() for m, found in graph.items()}).static_order())
    assert order.index("fedllm.lowrank") < order.index("fedllm.core") < order.index("fedllm.algorithms")


def test_what_is_imported_is_declared(imports):
    """A module that came along with another package would be gone the day that one drops it."""
    names = {m.split(".")[0] for found in imports.values() for m in found} - set(sys.stdlib_module_names) - {"fedllm"}
    owners = packages_distributions()
    assert {"torch", "transformers"} <= names
    assert {name for name in names if not declared().keys() & set(map(normal, owners.get(name, [name])))} == set()


def test_only_the_command_imports_the_program(imports):
    assert {name for name, found in imports.items() if "fedllm.train" in found} <= {"fedllm.library", "fedllm.cli"}


@pytest.mark.parametrize("line", ["open('/work/x')", "at /root/.cache", '"/home/ann/data"', "/Users/ann"])
def test_a_machine_path_is_noticed(line):
    assert MACHINE.search(line)


@pytest.mark.parametrize("line", ["https://example.com/work/x", "../root/x", "framework/core", "runs/home/x", "/home/"])
def test_other_paths_are_let_through(line):
    assert not MACHINE.search(line)


def test_no_tracked_file_names_a_machine():
    """This file is left out: it spells such paths to show that they are noticed."""
    texts = {path: path.read_bytes().decode(errors="replace") for path in tracked() if path != Path(__file__)}
    assert len(texts) > 20
    found = {str(path.relative_to(ROOT)): MACHINE.findall(text) for path, text in texts.items()}
    assert {name: paths for name, paths in found.items() if paths} == {}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel of this checkout, built with the installed hatchling: nothing is downloaded."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    built = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def in_dist_info(wheel: zipfile.ZipFile, name: str) -> str:
    (member,) = [m for m in wheel.namelist() if m.endswith(f".dist-info/{name}")]
    return wheel.read(member).decode()


@pytest.mark.parametrize("pages", ["recipes", "sweeps"])
def test_the_wheel_carries_the_pages_unchanged(wheel, pages):
    written = {f"fedllm/{pages}/{path.name}": path.read_bytes() for path in (ROOT / pages).glob("*.yaml")}
    carried = {name: wheel.read(name) for name in wheel.namelist() if name.startswith(f"fedllm/{pages}/")}
    assert written
    assert carried == written


def test_the_wheel_carries_every_module_and_no_other_package(wheel):
    modules = {str(path.relative_to(ROOT)) for path in tracked() if path.is_relative_to(ROOT / "fedllm")}
    assert modules <= set(wheel.namelist())
    assert {name.split("/")[0] for name in wheel.namelist()} == {"fedllm", f"fedllm-{fedllm.__version__}.dist-info"}


def test_the_wheel_carries_the_licence(wheel):
    assert in_dist_info(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    assert email.message_from_string(in_dist_info(wheel, "METADATA"))["License-Expression"] == "Apache-2.0"


def test_the_version_is_written_once(wheel):
    assert email.message_from_string(in_dist_info(wheel, "METADATA"))["Version"] == fedllm.__version__
    assert fedllm.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_the_command_is_installed(wheel):
    scripts = configparser.ConfigParser()
    scripts.read_string(in_dist_info(wheel, "entry_points.txt"))
    assert dict(scripts["console_scripts"]) == {"fedllm": "fedllm.cli:main"}


def test_recipes_are_found_from_the_wheel_alone(wheel, tmp_path):
    """Unpacked as pip would, and started from a folder that has no recipes."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    wheel.extractall(site)
    elsewhere.mkdir()
    program = (
        "import fedllm, json; from fedllm.recipe import page; from fedllm.commands import sweep; "
        "print(json.dumps([fedllm.__file__, str(page.find('smoke')), str(sweep.find('smoke'))]))"
    )
    command = [sys.executable, "-c", program]
    env = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, check=False, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    code, recipe, sweep = map(Path, json.loads(done.stdout))
    assert code.is_relative_to(site)
    assert recipe == site / "fedllm" / "recipes" / "smoke.yaml"
    assert sweep == site / "fedllm" / "sweeps" / "smoke.yaml"


def test_every_dependency_is_pinned_for_integration():
    """A lower bound that is not the pinned version was not tested."""
    lines = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    pins = {normal(name): version for name, version in lines}
    assert not any("+" in version for version in pins.values())
    assert {name: bound for name, bound in declared().items() if not f"{pins[name]}.".startswith(f"{bound}.")} == {}
