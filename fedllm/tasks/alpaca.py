"""Instructions with an answer, and Alpaca (Taori et al., 2023): 52,002 of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedllm.config.types import Whole
from fedllm.data import sources as corpus
from fedllm.data.sources import Row, Sources
from fedllm.tasks.rouge import RougeTokenizer, rouge_l
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


@dataclass(frozen=True)
class Instructed(Task):
    """An instruction, further text that may be empty, and the answer. The score is Rouge-L F of the *generated* answer.

    Args:
        prompt_with_input: the prompt of a row whose further text is not empty.
        rouge_tokenizer: what a word is, `fedllm.tasks.rouge`: of any script (``unicode``); ``a-z`` and ``0-9`` alone,
            as published (``english``); between blanks (``blanks``).
    """

    prompt_template: str = ALONE
    prompt_with_input: str = BESIDE % "input"
    target_template: str = "{output}"
    stop: tuple[str, ...] = ("\n### ",)
    rouge_tokenizer: RougeTokenizer = "unicode"

    columns: ClassVar[tuple[str, ...]] = ()
    metrics: ClassVar[tuple[str, ...]] = ("rouge_l",)
    extraction: ClassVar[str] = "instructed/2: Rouge-L F, rouge_score without stemmer, words by rouge_tokenizer"
    templates: ClassVar[tuple[str, ...]] = ("prompt_template", "prompt_with_input", "target_template")
    further: ClassVar[str] = "input"

    def prompt(self, row: Row) -> str:
        template = self.prompt_with_input if self._has_further(row) else self.prompt_template
        return template.format_map(row)

    def needed(self, row: Row) -> Sequence[str]:
        return ["prompt_with_input" if self._has_further(row) else "prompt_template", "target_template"]

    def _has_further(self, row: Row) -> bool:
        """Whether there is further text; none and a missing column are the empty one."""
        text = row.get(self.further)
        return text is not None and (not isinstance(text, str) or bool(text.strip()))

    def score(self, generated: str, row: Row) -> dict[str, float]:
        return {"rouge_l": rouge_l(self.answered(generated), self.target(row), self.rouge_tokenizer)}


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
