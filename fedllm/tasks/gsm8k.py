"""GSM8K (Cobbe et al., 2021, arXiv:2110.14168) and the generated problems in its format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import ClassVar

from fedllm.config.types import Count, Seed
from fedllm.data import sources as corpus
from fedllm.data.sources import Row, Sources
from fedllm.errors import FedError
from fedllm.tasks import word_problems
from fedllm.tasks.task import Task

# Thousands commas only in groups of three: "1,2" is two numbers. A minus after a word, a digit or a bracket subtracts
# or makes a range: the last number of "16-3" is 3. A final period is the sentence's.
_GAP = "\u00a0\u2009\u202f"  # spaces that typesetters put between thousands; behind #### a plain one too
_DIGITS = rf"[0-9]{{1,3}}(?:[,{_GAP}][0-9]{{3}})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
_SPACED = r"[0-9]{1,3}(?: [0-9]{3})+(?![0-9])(?:\.[0-9]+)?"
_OVER = r"(?: ?/ ?(?P<under>[0-9]+))"
_SIGN = "(?:\\$ ?(?P<inner>[-\u2212])?)?"
_NUMBER = re.compile(rf"(?P<sign>(?<![\w)\]%])[-\u2212])?{_SIGN}(?P<digits>{_DIGITS})")
_SHARE = re.compile(rf"{_NUMBER.pattern}{_OVER}?")
_MARKED = re.compile(rf"####\s*(?P<sign>[-\u2212])?{_SIGN}(?P<digits>{_SPACED}|{_DIGITS}){_OVER}?")
_PUBLISHED = re.compile(r"#### (\-?[0-9\.\,]+)")


def marked_number(text: str) -> Fraction | None:
    """Strict: the number right after the first ``####`` that has one. ``3/8`` is a number."""
    match = _MARKED.search(text)
    return _value(match) if match else None


def gold_number(text: str) -> Fraction | None:
    """``marked_number`` of a row's own answer; None too where more digits follow on its line, as in ``1 1/2``."""
    match = _MARKED.search(text)
    if match is None or re.match(r"[^\n(]{0,3}\d|\s*[eE^]|\s*[\u00bc-\u00be\u2150-\u215e]", text[match.end() :]):
        return None
    return _value(match)


def last_number(text: str, *, fractions: bool = False) -> Fraction | None:
    """Flexible: the last number of the text, wherever it stands; ``fractions`` reads ``3/8`` as one."""
    matches = list((_SHARE if fractions else _NUMBER).finditer(text))
    return _value(matches[-1]) if matches else None


def published(text: str) -> str | None:
    """The extraction that was published with GSM8K (grade-school-math), to the letter; a text, not a number."""
    match = _PUBLISHED.search(text)
    return match.group(1).strip().replace(",", "") if match else None


def _value(match: re.Match[str]) -> Fraction | None:
    value = Fraction(Decimal(re.sub(rf"[, {_GAP}]", "", match["digits"])))
    under = match.groupdict().get("under")
    if under is not None:
        if not under.strip("0"):
            return None
        value /= Fraction(Decimal(under))
    return -value if match["sign"] or match["inner"] else value


@dataclass(frozen=True)
class WorkedMath(Task):
    """Questions whose answer is worked out line by line and ends in ``#### number``.

    Three scores. ``exact_match`` wants the number behind ``####``, ``exact_match_flexible`` takes the last number of
    the answer; both compare numbers, so 1,080 is 1080, $18.00 is 18 and 3/8 is 0.375. ``exact_match_published`` is the
    regular expression that was published with GSM8K, to the letter: the one to set beside published numbers.
    """

    prompt_template: str = "Question: {question}\nAnswer:"
    target_template: str = " {answer}"
    stop: tuple[str, ...] = ("Question:",)

    columns: ClassVar[tuple[str, ...]] = ("answer",)
    metrics: ClassVar[tuple[str, ...]] = ("exact_match", "exact_match_flexible", "exact_match_published")
    max_new_tokens: ClassVar[int] = 512  # the longest answer of GSM8K is 454 of SmolLM2's tokens
    extraction: ClassVar[str] = "gsm8k/2"

    def score(self, generated: str, row: Row) -> dict[str, float]:
        gold, answer = gold_number(row["answer"]), self.answered(generated)
        if gold is None:  # it would equal the None of an answer without a number
            raise FedError(f"This row cannot be scored: {self.problem(row)}")
        wanted = published(row["answer"])
        return {
            "exact_match": float(marked_number(answer) == gold),
            "exact_match_flexible": float(last_number(answer, fractions=gold.denominator > 1) == gold),
            "exact_match_published": float(wanted is not None and published(answer) == wanted),
        }

    def problem(self, row: Row) -> str | None:
        if gold_number(row["answer"]) is None:
            return f"its answer has no '#### number', so nothing can be scored; it ends in {row['answer'][-30:]!r}."
        return None


@dataclass(frozen=True)
class GSM8K(WorkedMath):
    """Grade-school maths: 7,473 training and 1,319 test problems; MIT licence.

    Args:
        hub: id on the Hub.
        subset: ``main``; ``socratic`` has questions inside its answers.
        revision: of the data set, to pin it.
    """

    hub: str = "openai/gsm8k"
    subset: str | None = "main"
    revision: str | None = None

    @property
    def rows(self) -> dict[str, int]:
        return {"train": 7473, "test": 1319}

    def _origin(self) -> str:
        return self.hub

    def _sources(self) -> Sources:
        return corpus.hub(self.hub, self.subset, self.revision)


@dataclass(frozen=True)
class WordProblems(WorkedMath):
    """Generated problems in GSM8K's format: no download. Rows have the labels ``template`` and ``difficulty``.

    Args:
        train_rows: how many are made for training.
        test_rows: how many for testing; no question is in both.
        difficulty: of ``easy``, ``medium`` and ``hard``; repeats are weights.
        generator_seed: another seed, other problems.
    """

    train_rows: Count = 2000
    test_rows: Count = 200
    difficulty: tuple[str, ...] = word_problems.DIFFICULTIES
    generator_seed: Seed = 0

    max_new_tokens: ClassVar[int] = 128  # the longest of 20,000 generated answers is 99 of SmolLM2's tokens

    @property
    def rows(self) -> dict[str, int]:
        return {"train": self.train_rows, "test": self.test_rows}

    def _origin(self) -> str:
        return "the generated word problems"

    def _sources(self) -> Sources:
        try:
            train, test = word_problems.split(self.train_rows, self.test_rows, self.generator_seed, self.difficulty)
        except ValueError as error:
            raise FedError(f"word_problems: {error}.") from error
        return {"train": lambda: [dict(row) for row in train], "test": lambda: [dict(row) for row in test]}
