"""Instructions with an answer, and Alpaca (Taori et al., 2023): 52,002 of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from fedllm.config.types import Whole
from fedllm.data import sources as corpus
from fedllm.data.sources import Row, Sources
from fedllm.tasks.task import Task

ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
BESIDE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{%s}\n\n### Response:\n"
)


def rouge_l(generated: str, target: str) -> float:
    """Rouge-L F of two texts, from 0 to 1 (Lin, 2004), by ``rouge_score``: its tokens, no stemming."""
    return float(_scorer().score(target, generated)["rougeL"].fmeasure)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


@dataclass(frozen=True)
class Instructed(Task):
    """An instruction, further text that may be empty, and the answer. The score is Rouge-L F of the *generated* answer.

    Args:
        prompt_with_input: the prompt of a row whose further text is not empty.
    """

    prompt_template: str = ALONE
    prompt_with_input: str = BESIDE % "input"
    target_template: str = "{output}"
    stop: tuple[str, ...] = ("\n### ",)

    columns: ClassVar[tuple[str, ...]] = ("instruction", "input", "output")
    metrics: ClassVar[tuple[str, ...]] = ("rouge_l",)
    extraction: ClassVar[str] = "instructed/1: Rouge-L F, rouge_score without stemmer"
    templates: ClassVar[tuple[str, ...]] = ("prompt_template", "prompt_with_input", "target_template")
    further: ClassVar[str] = "input"

    def prompt(self, row: Row) -> str:
        template = self.prompt_with_input if row[self.further].strip() else self.prompt_template
        return template.format_map(row)

    def score(self, generated: str, row: Row) -> dict[str, float]:
        return {"rouge_l": rouge_l(self.answered(generated), self.target(row))}


@dataclass(frozen=True)
class Alpaca(Instructed):
    """52,002 instructions answered by text-davinci-003; CC BY-NC 4.0. It has no test split: some rows are held out.

    Args:
        hub: id on the Hub.
        revision: of the data set, to pin it.
    """

    held_out: Whole = 1000
    hub: str = "tatsu-lab/alpaca"
    revision: str | None = None

    max_new_tokens: ClassVar[int] = 256  # 99 % of the answers in a sample of 7,407 rows fit, in SmolLM2's tokens

    @property
    def rows(self) -> Mapping[str, int]:
        return {"train": 52002 - self.held_out, "test": self.held_out}

    def _origin(self) -> str:
        return self.hub

    def _sources(self) -> Sources:
        return corpus.hub(self.hub, None, self.revision)
