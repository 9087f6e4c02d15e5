"""Databricks Dolly 15k (Conover et al., 2023): instructions of eight kinds, written and answered by people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedllm.config.types import Whole
from fedllm.data import sources as corpus
from fedllm.data.sources import Sources
from fedllm.tasks.alpaca import BESIDE, Instructed


@dataclass(frozen=True)
class Dolly(Instructed):
    """15,011 rows, CC BY-SA 3.0; ``category`` is a label to split by. It has no test split: some rows are held out.

    Eight rows are exact repeats; a repeat of a held-out row may be trained on.

    Args:
        hub: id on the Hub.
        revision: of the data set, to pin it.
    """

    prompt_with_input: str = BESIDE % "context"
    target_template: str = "{response}"
    held_out: Whole = 200
    hub: str = "databricks/databricks-dolly-15k"
    revision: str | None = None

    columns: ClassVar[tuple[str, ...]] = ("category",)
    max_new_tokens: ClassVar[int] = 256  # 95 % of the answers fit, in SmolLM2's tokens; Rouge-L of a longer one suffers
    extraction: ClassVar[str] = "dolly/2: Rouge-L F, rouge_score without stemmer, words by rouge_tokenizer"
    further: ClassVar[str] = "context"
    by: ClassVar[str | None] = "category"

    @property
    def rows(self) -> Mapping[str, int]:
        return {"train": 15011 - self.held_out, "test": self.held_out}

    def _origin(self) -> str:
        return self.hub

    def _sources(self) -> Sources:
        return corpus.hub(self.hub, None, self.revision)
