"""Rouge-L (Lin, 2004) by three named rules of what a word is.

- ``unicode``: letters, digits and marks of any script, lower case, NFKC; a sign of a script without spaces is a word of
  its own, as is any sign where the target has no letters. On ASCII texts with letters it equals ``english``.
- ``english``: that of ``rouge_score``: ``a-z`` and ``0-9`` alone. A text in another script has no words.
- ``blanks``: that of the package ``rouge``, which FederatedScope-LLM scores with: words between blanks, case counts,
  sentences end at full stops, each different word counts once.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

RougeTokenizer = Literal["unicode", "english", "blanks"]

UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO", "YI SYLLABLE")
"""Scripts that write no spaces, as the names of their signs begin."""


def rouge_l(generated: str, target: str, tokenizer: RougeTokenizer = "unicode") -> float:
    """Rouge-L F of two texts, from 0 to 1."""
    if tokenizer == "blanks":
        return by_blanks(generated, target)
    if tokenizer == "unicode" and generated.strip() == target.strip():
        return 1.0  # where both are empty there is no word to count
    return float(_scorer(tokenizer, not words(target))["score"](target, generated)["rougeL"].fmeasure)


@cache
def _scorer(tokenizer: RougeTokenizer, signs: bool) -> dict[str, Any]:
    from rouge_score.rouge_scorer import RougeScorer

    own = None if tokenizer == "english" else _Words(signs)
    return {"score": RougeScorer(["rougeL"], use_stemmer=False, tokenizer=own).score}


class _Words:
    """The tokenizer interface of ``rouge_score``."""

    def __init__(self, signs: bool) -> None:
        self.signs = signs

    def tokenize(self, text: str) -> list[str]:
        return list("".join(unicodedata.normalize("NFKC", text).split())) if self.signs else words(text)


def words(text: str) -> list[str]:
    """The ``unicode`` rule's words."""
    found: list[str] = []
    inside = False
    for sign in unicodedata.normalize("NFKC", text).lower():
        kind = unicodedata.category(sign)[0]
        alone = not sign.isascii() and kind in "LN" and unicodedata.name(sign, "").startswith(UNSPACED)
        if alone:
            found.append(sign)
        elif kind in "LN" or (kind == "M" and (inside or found)):
            if inside or kind == "M":
                found[-1] += sign
            else:
                found.append(sign)
        inside = not alone and kind in "LNM"
    return found


def by_blanks(generated: str, target: str) -> float:
    """Rouge-L as the package ``rouge`` (1.0.1) defines it, summary level: union of longest common subsequences.

    An empty text scores 0, where that package raises.
    """
    own, wanted = _sentences(generated), _sentences(target)
    if not own or not wanted:
        return 0.0
    union: set[str] = set()
    for sentence in wanted:
        for other in own:
            union |= set(_common(sentence, other))
    precision = len(union) / len({word for sentence in own for word in sentence})
    recall = len(union) / len({word for sentence in wanted for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common(x: Sequence[str], y: Sequence[str]) -> list[str]:
    """The longest common subsequence; of several, the one that steps back in ``y`` first."""
    lengths = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, a in enumerate(x, start=1):
        for j, b in enumerate(y, start=1):
            lengths[i][j] = lengths[i - 1][j - 1] + 1 if a == b else max(lengths[i - 1][j], lengths[i][j - 1])
    found: list[str] = []
    i, j = len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            found.append(x[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]
