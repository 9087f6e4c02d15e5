"""Every command on every page: run, planned, known to the command line, or marked as not run with the reason."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from fedllm.cli import command, main
from fedllm.config.arguments import spelled
from fedllm.errors import FedError
from fedllm.recipe import load

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "results" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = r"(?:<!-- (?P<mark>run|plan|not run: [^>]+) -->\n)?"
FENCED = re.compile(MARK + r"```(?P<kind>\w*)[^\n]*\n(?P<text>.*?)```", re.DOTALL)
INDENTED = re.compile(MARK + r"\n?(?:(?<=\n\n)|(?<=-->\n))(?P<text>(?: {4}[^\n]*\n)+)")
PROGRAMS = {"fedllm", "accelerate", "torchrun", "python", "python3", "pip", "make", "git", "cp", "source", "mkdocs"}
RECIPES = {"train", "plan"}


@dataclass(frozen=True)
class Block:
    """Commands of one place on a page."""

    page: str
    mark: str
    commands: tuple[str, ...]


def commands(text: str) -> tuple[str, ...]:
    """The command lines of a block: continued lines joined, comments and prompts left out."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = (line.strip().removeprefix("$ ") for line in joined.splitlines())
    found = [line for line in lines if line and line.split()[0].rpartition("/")[2] in PROGRAMS | {"OMP_NUM_THREADS=1"}]
    return tuple(found)


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    found = [m for m in FENCED.finditer(text) if m["kind"] in {"", "bash", "sh", "console", "text"}]
    both = [*found, *INDENTED.finditer(plain)]
    made = [Block(page.name, (m["mark"] or ""), commands(m["text"])) for m in both]
    return [block for block in made if block.commands]


ALL = [block for page in PAGES for block in blocks(page)]


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def recipe_words(line: str) -> list[str] | None:
    """The recipe and keys of a line that trains or plans; None of another."""
    told = words(line)
    if told[0] == "fedllm" and told[1] in RECIPES:
        return [word for word in spelled(told[2:]) if word != "json=true"]
    if "fedllm/train.py" in told:
        return spelled(told[told.index("fedllm/train.py") + 1 :])
    return None


def check(line: str) -> None:
    """A recipe's keys are read and its values checked; any other command line is parsed by the command itself."""
    if (recipe := recipe_words(line)) is not None:
        load(recipe)
        return
    told = words(line)
    assert told[0] == "fedllm", f"{line}: run it, or mark the block as not run, with the reason"
    current: click.Command = command
    context = click.Context(command, info_name="fedllm")
    rest = told[1:]
    while isinstance(current, click.Group):
        _, found, rest = current.resolve_command(context, rest)
        assert found is not None, line
        current, context = found, click.Context(found, parent=context)
    current.make_context(current.name, list(rest), parent=context.parent)


def words_planned(line: str) -> tuple[str, ...]:
    recipe = recipe_words(line)
    assert recipe is not None, line
    return tuple(recipe)


def test_pages_have_commands() -> None:
    assert len(ALL) > 15 and {block.mark.partition(":")[0] for block in ALL} >= {"run", "plan", "not run"}


@pytest.mark.parametrize("block", [b for b in ALL if b.mark == ""], ids=lambda b: f"{b.page}: {b.commands[0][:50]}")
def test_an_unmarked_command_is_one_that_there_is(block: Block) -> None:
    for line in block.commands:
        check(line)


def test_a_command_that_there_is_not_is_noticed() -> None:
    for line in (
        "fedllm trian smoke",
        "fedllm aggregate flexlora a --ot x",
        "fedllm train smoke worker.learning_rat=1",
    ):
        with pytest.raises((FedError, click.ClickException)):
            check(line)


@pytest.mark.parametrize("words", sorted({words_planned(line) for b in ALL if b.mark == "plan" for line in b.commands}))
def test_a_planned_command_can_be_planned(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 0, capsys.readouterr().err


def running(page: str) -> list[str]:
    return [line for block in ALL if block.page == page and block.mark == "run" for line in block.commands]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder beside nothing: what a reader of the page stands in, but for the programs of the checkout."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({b.page for b in ALL if b.mark == "run"}))
def test_a_page_runs_from_its_top_to_its_end(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in running(page):
        told = words(line)
        if told[:2] == ["cp", "-r"]:
            shutil.copytree(told[2], told[3])
            continue
        assert told[0] == "fedllm", f"{line}: only fedllm's own commands are run in a page's test"
        code = main(told[1:])
        assert code in (0, None), f"{line}: {capsys.readouterr().err}"


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """No link without its target, no page outside the navigation, no object that cannot be documented."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    reference = (tmp_path / "site" / "recipes.html").read_text()
    assert "worker.learning_rate" in reference and "aggregate" in (tmp_path / "site" / "methods.html").read_text()
