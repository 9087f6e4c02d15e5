"""Prompts and completions as tokens: what a client trains on and what a score is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Encoded:
    """One row. ``labels[i]`` is ``input_ids[i]`` on the completion and -100 on the prompt.

    Args:
        cut: whether the end of the completion, and with it the end of sequence, was lost to the limit on tokens.
    """

    input_ids: list[int]
    labels: list[int]
    cut: bool = False

    @property
    def trained(self) -> int:
        """Tokens that carry a loss; the first token of a sequence never does."""
        return sum(label != -100 for label in self.labels[1:])


def encode(tokenizer: Any, prompts: Sequence[str], completions: Sequence[str], max_length: int) -> list[Encoded]:
    """Rows as TRL prepares prompt/completion data: end-of-sequence appended, loss on the completion, cut at the end.

    The completion starts where the tokens of the prompt and of prompt + completion part, which is not always after the
    prompt: tokens may merge across the boundary. A row whose completion is cut off entirely has ``trained == 0``.
    """
    eos = tokenizer.eos_token or ""
    completions = [text if text.endswith(eos) else text + eos for text in completions]
    heads = tokens(tokenizer, prompts)
    wholes = tokens(tokenizer, [prompt + text for prompt, text in zip(prompts, completions, strict=True)])
    return [_labelled(head, whole, max_length) for head, whole in zip(heads, wholes, strict=True)]


def without_loss(row: Encoded) -> Encoded:
    """A row that has no completion to be scored: the end of sequence behind nothing is none."""
    return Encoded(row.input_ids, [-100] * len(row.labels), row.cut)


def tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without the end of sequence that some tokenizers append: a prompt is to be continued."""
    ids = tokenizer(list(texts))["input_ids"]
    appended = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    return [of[:-1] for of in ids] if appended else ids


def decode_answer(tokenizer: Any, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """The text that ``answer`` adds to ``prompt``: decode(prompt + answer) after decode(prompt).

    Decoding the answer alone loses its first space with Llama-2's kind of tokenizer, whose decoder strips one from the
    start of whatever it is given. Special tokens are left out, and nothing is cleaned up.

    Args:
        tokenizer: that both were encoded with.
        prompt: token ids; may be empty.
        answer: the token ids that follow.
    """

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    head, whole = text(prompt), text([*prompt, *answer])
    while head.endswith("\ufffd") and not whole.startswith(head):  # the prompt ends inside a character
        head = head[:-1]
    if whole.startswith(head):
        return whole[len(head) :]
    shared = next((i for i, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), min(len(head), len(whole)))
    return whole[shared:]


def _labelled(head: list[int], whole: list[int], max_length: int) -> Encoded:
    shared = next((i for i, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), min(len(head), len(whole)))
    labels = [-100] * shared + whole[shared:]
    return Encoded(whole[:max_length], labels[:max_length], len(whole) > max_length)
