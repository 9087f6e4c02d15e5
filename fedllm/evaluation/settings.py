"""The settings of an evaluation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedllm.config import plain_yaml
from fedllm.config.schema import parse_section
from fedllm.config.suggest import nearest
from fedllm.config.types import Between, Count, NonNegative, Seed, SomeShare
from fedllm.errors import FedError
from fedllm.recipe import page as recipes
from fedllm.storage.peft_folder import inside
from fedllm.tasks import TEXTS
from fedllm.tasks.code import HumanEval
from fedllm.tasks.task import Task

SCORED: dict[str, type[Task]] = TEXTS | {"humaneval": HumanEval}
"""Every task that can be scored, by the name that ``task`` takes."""


SCORING = ("confidence", "resamples", "k", "output", "overwrite", "threads", "accept_missing", "allow_code_execution")
"""Settings that no generation depends on: with others, the same generations are scored again."""


@dataclass(frozen=True)
class Settings:
    """What is scored, and how.

    Args:
        run: a run's folder: its adapter on its model, by its own prompts.
        adapter: a PEFT folder.
        model: a Hub id, a folder or a GGUF file; by default the one that the run or the adapter names.
        revision, dtype, quantization: of the model.
        data: the task's keys, and ``path`` for local files.
        rows: score this many test rows, the first of a shuffle seeded by ``seed``.
        seed: of that shuffle, of sampling, and of the bootstrap.
        generate: generate answers and score them; the held-out loss alone otherwise.
        batch_size: rows at once.
        max_new_tokens: cut an answer off here; the task's own limit by default.
        max_length: tokens that a row is cut to for the held-out loss.
        samples: answers a row. One is greedy; more are drawn with ``temperature`` and ``top_p``.
        k: the k of pass@k, where programs are scored.
        backend: what generates; ``vllm`` where it is installed, and without the held-out loss.
        confidence: of the bootstrap intervals.
        resamples: of the bootstrap.
        output: folder for the results.
        overwrite: discard what was generated there with other settings.
        threads: of each process on the CPU.
        allow_code_execution: run the programs that the model writes, in the sandbox.
        accept_missing: guarantees of the sandbox to do without where this machine does not give them.
    """

    run: str | None = None
    adapter: str | None = None
    model: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "4bit", "8bit"] = "none"
    data: dict[str, Any] = field(default_factory=dict)
    rows: Count | None = None
    seed: Seed = 0
    generate: bool = True
    batch_size: Count = 16
    max_new_tokens: Count | None = None
    max_length: Count = 1024
    samples: Count = 1
    temperature: NonNegative = 0.8
    top_p: SomeShare = 0.95
    k: tuple[Count, ...] = (1,)
    backend: Literal["transformers", "vllm"] = "transformers"
    confidence: Between = 0.95
    resamples: Count = 2000
    output: str | None = None
    overwrite: bool = False
    threads: Count | None = None
    allow_code_execution: bool = False
    accept_missing: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.k or max(self.k) > self.samples:
            raise FedError(f"k={list(self.k)}: each from 1 to samples={self.samples}, the answers that are drawn.")
        if self.samples > 1 and self.temperature == 0:
            raise FedError(f"temperature={self.temperature}: more than 0, for samples={self.samples} to differ.")


def parse(task: str | None, arguments: Sequence[str]) -> tuple[Settings, str, recipes.Recipe | None]:
    """The settings of ``a.b=c`` arguments, the task's name, and the recipe of the run where one is scored."""
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals or not key:
            raise FedError(f"{argument!r} is not understood: give a.b=c, such as model=ID rows=32.")
    try:
        page = plain_yaml.assignments(arguments)
    except FedError as error:
        raise FedError(f"these arguments cannot be read: {error}") from error
    if isinstance(page.get("data"), str):
        raise FedError(f"data={page['data']}: rows are named by data.path={page['data']}, the task by task=NAME.")
    asked = page.pop("task", None) if task is None else None
    settings: Settings = parse_section(Settings, page, "")
    run = None
    if settings.run is not None:
        if settings.adapter or settings.model:
            raise FedError(
                f"run={settings.run} names its own model and adapter: give it alone, or model=... adapter=...."
            )
        file = Path(settings.run) / "recipe.yaml"
        if not file.is_file():
            raise FedError(f"run={settings.run} is not a run's folder: there is no recipe.yaml in it.")
        run = recipes.load([f"recipe={file}"])
    name = task or asked or (run.data_name if run else None)
    if name is None:
        raise FedError(f"which task? Give task=NAME, one of: {', '.join(sorted(SCORED))}.")
    if not isinstance(name, str) or name not in SCORED:
        raise FedError(f"task={name}: {nearest(str(name), SCORED, 'task')}")
    return settings, str(name), run


def target_arguments(target: str, others: Sequence[str] = ()) -> list[str]:
    """``run=``, ``adapter=`` or ``model=``: which of them a path or id is.

    Args:
        others: what else the line says; it may not name another subject of the same kind.
    """
    found = _target(target)
    key = found.partition("=")[0]
    again = next((other for other in others if other.startswith((f"{key}=", f"--{key}"))), None)
    if again is not None:
        raise FedError(f"{target} is what is scored ({found}), and {again} names another. Give one of them.")
    return [found]


def _target(target: str) -> str:
    path = Path(target)
    if target.startswith((".", "/", "~")) and not path.expanduser().exists():
        raise FedError(f"{target} is not there: give a run's folder, a PEFT folder, a model's folder or a Hub id.")
    if (path / "recipe.yaml").is_file():
        return f"run={target}"
    return f"adapter={target}" if (inside(path) / "adapter_config.json").is_file() else f"model={target}"


def default_output(settings: Settings, task: str) -> Path:
    if settings.run is not None:
        return Path(settings.run) / "eval" / task
    name = str(settings.adapter or settings.model)
    return Path("runs") / "evaluations" / f"{task}--{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.')[-80:]}"


def plain_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
