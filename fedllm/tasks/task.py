"""What every task is: rows, the prompt and the target made of a row, and the score of an answer to it."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fedllm.config.types import Seed, Whole
from fedllm.data import sources as corpus
from fedllm.data.sources import Row, Sources, Split
from fedllm.errors import FedError


@dataclass(frozen=True)
class Task:
    """A corpus and everything about it. The fields of a subclass are its keys in a recipe's ``data`` section.

    Args:
        prompt_template: the prompt, columns in braces.
        target_template: what the model should write after it; the space between the two belongs here.
        stop: generation may end where one of these begins, and `score` reads no further.
        held_out: training rows kept for testing, where the corpus has no test split of its own.
        held_out_seed: which ones; the same rows in any order of the file.

    Attributes:
        columns: columns of text that every row must have, whatever the templates name.
        metrics: the keys of `score`, the one to report first.
        max_new_tokens: enough for the longest target.
        extraction: version of the rules by which `score` reads an answer; it belongs beside every published number.
        templates: the fields that are templates over a row's columns.
        runs_code: scoring runs what the model wrote, so a recipe has to allow it.
        by: a column whose values are reported apart.
    """

    prompt_template: str
    target_template: str
    stop: tuple[str, ...] = ()
    held_out: Whole = 0
    held_out_seed: Seed = 0

    columns: ClassVar[tuple[str, ...]]
    metrics: ClassVar[tuple[str, ...]]
    max_new_tokens: ClassVar[int]
    extraction: ClassVar[str]
    templates: ClassVar[tuple[str, ...]] = ("prompt_template", "target_template")
    runs_code: ClassVar[bool] = False
    by: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        for key in self.templates:
            _placeholders(getattr(self, key), key)
        if "" in self.stop:
            raise FedError("stop: an empty text would end every answer before it begins.")

    @property
    def rows(self) -> Mapping[str, int]:
        """Rows of each split without a ``data.path``: for planning, where the Hub cannot be reached."""
        raise NotImplementedError

    def load(self, path: str | None, split: Split) -> list[Row]:
        """The rows of a split, each checked: from a local file or folder, or from where the task's own rows are.

        Raises:
            FedError: what is missing, empty or malformed, with the row's number.
        """
        where = f"data.path={path}" if path is not None else self._origin()
        sources = self._sources() if path is None else self._local(path)
        numbers, found = corpus.choose(sources, split, self.held_out, self.held_out_seed, where)
        if not found:
            raise FedError(f"The {split} split of {where} is empty: there is nothing to {_USE[split]}.")
        for number, row in zip(numbers, found, strict=True):
            problem = self._missing(row) or self.problem(row)
            if problem:
                raise FedError(f"{where}, {split} row {number}: {problem}")
        return found

    def prompt(self, row: Row) -> str:
        return self.prompt_template.format_map(row)

    def target(self, row: Row) -> str:
        return self.target_template.format_map(row)

    def label(self, row: Row, column: str) -> str | int:
        """The row's label in a column, for a partition by label. Raises FedError for an unknown column."""
        return corpus.label(row, column)

    def score(self, generated: str, row: Row) -> dict[str, float]:
        """Each of `metrics` for one generated answer, from 0 to 1."""
        raise NotImplementedError

    def score_all(
        self, generated: Sequence[str], rows: Sequence[Row], accept_missing: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """`score` for each answer; a task that runs programs runs them at once, and adds what became of each.

        Args:
            accept_missing: the sandbox's guarantees to do without, where `runs_code`.
        """
        return [self.score(text, row) for text, row in zip(generated, rows, strict=True)]

    def summary(self, scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Each of `metrics` over a test set: the mean."""
        if not scores:
            raise ValueError("there are no scores to average.")
        return {metric: sum(score[metric] for score in scores) / len(scores) for metric in self.metrics}

    def problem(self, row: Row) -> str | None:
        """What makes a row unusable that has all its columns."""
        return None

    def needed(self, row: Row) -> Sequence[str]:
        """Those of `templates` that this row is written by."""
        return self.templates

    def answered(self, generated: str) -> str:
        """The part of a generated text that counts: what comes before the first of `stop`."""
        ends = [generated.find(stop) for stop in self.stop if stop in generated]
        return generated[: min(ends)] if ends else generated

    @property
    def ends_near(self) -> tuple[str, ...]:
        """Texts after which `finished` is worth asking while an answer is generated."""
        return self.stop

    def finished(self, generated: str) -> bool:
        """Whether an answer that is still being generated has all that `score` reads."""
        return any(text in generated for text in self.stop)

    def _local(self, path: str) -> Sources:
        """Where rows come from when a path is given."""
        return corpus.local(path)

    def _origin(self) -> str:
        """The task's own source, in words."""
        raise NotImplementedError

    def _sources(self) -> Sources:
        """Where rows come from when no path is given."""
        raise NotImplementedError

    def _missing(self, row: Row) -> str | None:
        used = [field for key in self.needed(row) for field in _placeholders(getattr(self, key), key)]
        for column in dict.fromkeys([*self.columns, *used]):
            if column not in row:
                return f"there is no column {column!r}.{corpus.suggest(column, row)}"
            if not isinstance(row[column], str):
                return f"column {column!r} holds {str(row[column])[:40]!r}, and text is needed."
        return None


_USE = {"train": "train on", "test": "score"}


def _placeholders(template: str, key: str) -> list[str]:
    """The columns that a template names."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise FedError(
            f"{key}={template!r}: {error}. Write columns as {{name}}, and a brace of the text twice."
        ) from error
    for name in names:
        if not name or name.isdecimal() or "." in name or "[" in name:
            raise FedError(f"{key}={template!r}: {{{name}}} names no column. Write a column's name between the braces.")
    if not names:
        raise FedError(f"{key}={template!r} names no column: every row would read the same. Write one as {{name}}.")
    return names
