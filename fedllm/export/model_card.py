"""A model card written from a run's folder: what was trained, how, how well, at what cost, and with what."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import fedllm
from fedllm.export.merge import Merged
from fedllm.reports import intervals
from fedllm.reports.formatting import is_fraction, metric, number
from fedllm.reports.markdown import safe, said, table
from fedllm.reports.report import ALT, facts, gain, notes, summary_table, who
from fedllm.reports.run_record import Story, at, map_numbers, mapping, rows_of

CONFIDENCE = 0.95
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors", "huggingface_hub")

HUB_ID = re.compile(r"[\w][\w.-]*/[\w.-]+")


def versions() -> dict[str, str]:
    """What this process runs with, and the commit of the checkout it runs from, where there is one."""
    found = {"fedllm": fedllm.__version__, "python": platform.python_version()}
    found |= {name: metadata.version(name) for name in LIBRARIES}
    commit = _git("rev-parse", "HEAD")
    if commit:
        found["commit"] = commit + (", with uncommitted changes" if _git("status", "--porcelain", "-uno") else "")
    return found


def _git(*arguments: str) -> str:
    """Of the checkout that holds this package; empty where it lies elsewhere, or git is missing."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean, as `fedllm evaluate` gives it for these rows and this seed."""
    data = np.asarray(values, dtype=np.float64)
    found = intervals.interval(data, np.ones(len(data)), seed=seed, confidence=CONFIDENCE)
    return float(found["low"]), float(found["high"])


def scored(file: Path) -> list[Mapping[str, Any]]:
    """The rows of an ``eval/NAME.jsonl``; none where there is no such file, or it is damaged."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError):
        return []
    return [row for row in rows if isinstance(row, dict)]


def last_scores(run: Path, story: Story) -> list[Mapping[str, Any]]:
    return scored(run / "eval" / f"round_{story.rounds[-1]['round']:04d}.jsonl")


def intervals_table(run: Path, story: Story) -> str:
    """Every generated score of the last round with its interval, and its gain over the base model on the same rows."""
    ours, base = last_scores(run, story), scored(run / "eval" / "base.jsonl")
    paired = [row.get("prompt") for row in ours] == [row.get("prompt") for row in base]
    lines, told_seed = [], at(story.recipe, "run", "seed")
    seed = told_seed if isinstance(told_seed, int) and told_seed >= 0 else 0
    for key in mapping(story.rounds[-1].get("eval")):
        after = [number(row.get(key)) for row in ours]
        before = [number(row.get(key)) for row in base] if paired else []
        values = [value for value in after if value is not None]
        if not values or len(values) < len(after):
            continue
        low, high = interval(values, seed)
        gains = [a - b for a, b in zip(values, before, strict=True) if b is not None] if before else []
        told = "–"
        if len(gains) == len(values):
            worst, best = interval(gains, seed)
            told = f"{100 * np.mean(gains):+.1f} [{100 * worst:+.1f}, {100 * best:+.1f}]"
        mean = float(np.mean(values))
        lines.append(
            [said(key), str(len(values)), metric(key, mean), f"[{metric(key, low)}, {metric(key, high)}]", told]
        )
    return table(["score", "rows", "mean", "95 % interval", "points over the base model"], lines) if lines else ""


def text(
    run: Path,
    story: Story,
    *,
    licence: str | None,
    known: Mapping[str, str],
    plots: Sequence[str] = (),
    merged: Merged | None = None,
    repo: str | None = None,
) -> str:
    """The card in Markdown, metadata first.

    Args:
        licence: of what is uploaded, where it is known.
        known: versions of what the run ran with.
        plots: names of those that are uploaded with the card.
        merged: what was measured of the merged model, where the repository holds one.
        repo: where it is uploaded to.
    """
    from huggingface_hub import ModelCard

    data = card_data(story, licence, merged is not None)
    parts = [
        f"# {safe(repo.rpartition('/')[2] if repo else story.name)}",
        opening(story, merged is not None),
        *under("Use", [usage(story, merged is not None, repo)]),
        *under("Result", [summary_table(story.summary), intervals_table(run, story), INTERVALS, gain(story.summary),
                          *notes(story.summary), picture("learning", plots)]),
        *under("Data", [picture("data", plots)]),
        *under("Clients and ledger", [facts(story), *who(story), picture("traffic", plots)]),
        *under("Merge", [merge_table(merged)]),
        *under("Recipe", [recipe_fold(story)]),
        *under("Versions", [table(["", "version"], [[name, safe(version)] for name, version in known.items()])]),
        *under("Limits", [limits(story, licence)]),
    ]  # fmt: skip
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"))


INTERVALS = (
    "Intervals: Wilson's for shares of right answers, else the percentile bootstrap over the scored rows. They say "
    "what another draw of test rows would change, and nothing of another seed; a gain of no width: all rows agree."
)


def under(title: str, parts: Sequence[str]) -> list[str]:
    told = [part for part in parts if part]
    return [f"## {title}", *told] if told else []


def base_of(story: Story) -> str:
    return str(at(story.recipe, "model", "name") or "an unnamed model")


def hub_base(story: Story) -> str | None:
    """The base model's id, where it is one of the Hub."""
    name = base_of(story)
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def card_data(story: Story, licence: str | None, merged: bool) -> Any:
    """The metadata; scores of the last round in the model-index format."""
    from huggingface_hub import EvalResult, ModelCardData

    task = str(at(story.recipe, "data", "name") or "")
    dataset = str(at(story.recipe, "data", "hub") or "") or None
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=dataset or task,
            dataset_name=task,
            dataset_split="test",
            metric_type=key,
            metric_name=key.replace("_", " "),
            metric_value=value,
        )
        for key, value in map_numbers(story.rounds[-1].get("eval"))
    ]
    rule = str(at(story.recipe, "algorithm", "name") or "")
    base = hub_base(story)
    return ModelCardData(
        base_model=base,
        base_model_relation=("finetune" if merged else "adapter") if base else None,
        library_name="transformers" if merged else "peft",
        license=licence,
        pipeline_tag="text-generation",
        tags=[*dict.fromkeys(["federated-learning", "lora", "fedllm", rule])],
        datasets=[dataset] if dataset and HUB_ID.fullmatch(dataset) else None,
        model_name=story.name,
        eval_results=results or None,
        ignore_metadata_errors=False,
    )


def opening(story: Story, merged: bool) -> str:
    what = "A model" if merged else "A LoRA adapter"
    base = hub_base(story)
    on = f"[{safe(base)}](https://huggingface.co/{base})" if base else f"`{Path(base_of(story)).name}`"
    count = len(story.members)
    rule = safe(str(at(story.recipe, "algorithm", "name") or "an unnamed rule"))
    ranks = sorted((member.rank for member in story.members if member.rank), reverse=True)
    told = f" Ranks: {', '.join(map(str, ranks))}." if 0 < len(ranks) <= 20 else ""
    rounds = len(story.rounds)
    return (
        f"{what} fine-tuned from {on} by federated learning: {count} client{'s' * (count != 1)} trained LoRA "
        f"adapters, each on rows of its own, and a server aggregated them by **{rule}** in {rounds} rounds.{told}"
    )


def usage(story: Story, merged: bool, repo: str | None) -> str:
    where = repo or "THIS_FOLDER"
    if merged:
        return (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{where}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{where}")\n```\n\nThe adapter alone is in `adapter/`.'
        )
    return (
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{hub_base(story) or "BASE_MODEL"}")\n'
        f'model = PeftModel.from_pretrained(base, "{where}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{where}")\n```'
    )


def merge_table(merged: Merged | None) -> str:
    if merged is None:
        return ""
    lines = [
        ["float32 sum W' against W + BA in float64", f"{merged.merge_error:.2g} of the update's norm"],
        ["logits of the sum, reloaded, against base + adapter in PEFT", f"off by at most {merged.logits_error:.2g}"],
        ["the update changes logits", f"by up to {merged.effect:.2g}"],
        [f"cast to {merged.dtype}", f"costs {merged.cast_error:.2g} of the update's norm"],
        ["logits of the cast weights", f"off by at most {merged.cast_logits_error:.2g}"],
        ["the likeliest token is the same", f"at {100 * merged.same_token:.1f} % of the places"],
    ]
    return f"{merged.modules} weights were merged, in float32.\n\n" + table(["", "measured"], lines)


def shareable(value: Any) -> Any:
    """The same values with every absolute path cut to its last part: folders name people and machines."""
    if isinstance(value, Mapping):
        return {key: shareable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shareable(inner) for inner in value]
    if isinstance(value, str) and re.match(r"[/~\\]|[A-Za-z]:[\\/]", value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def recipe_page(story: Story) -> str:
    page = {part: inside for part, inside in story.recipe.items() if part != "hub"}
    return yaml.safe_dump(shareable(page), sort_keys=False, allow_unicode=True)


def recipe_fold(story: Story) -> str:
    if not story.recipe:
        return ""
    page = recipe_page(story)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", page)), default=0))
    return f"<details><summary>All of it</summary>\n\n{fence}yaml\n{page}{fence}\n\n</details>"


def limits(story: Story, licence: str | None) -> str:
    """What a reader must not take from the numbers."""
    lines = ["- This card was written by a program from the run's own files; nobody has read it."]
    rows = rows_of(story.summary)
    if any(is_fraction(key) for row in rows for key in row):
        lines.append("- One run, one seed: a score's spread over seeds is not known from it.")
    lines.append(
        "- Data that stays with its owner is not thereby private: updates can tell of the rows they were made from."
    )
    if licence is None:
        lines.append("- The licence of the base model could not be read; it also binds what was made from it.")
    return "\n".join(lines)


def picture(name: str, plots: Sequence[str]) -> str:
    return f"![{ALT[name]}](plots/{name}.png)" if name in plots else ""
