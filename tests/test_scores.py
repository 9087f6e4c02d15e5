"""Scores that would be false in silence: scripts, fractions, fences, shares near 0 and 1, row numbers."""

import json

import numpy as np
import pytest

from fedllm.errors import FedError
from fedllm.reports.intervals import interval, wilson
from fedllm.tasks.code import HumanEval
from fedllm.tasks.dolly import Dolly
from fedllm.tasks.gsm8k import GSM8K, last_number
from fedllm.tasks.rouge import by_blanks, rouge_l, words


@pytest.mark.parametrize(
    "text", ["猫坐在垫子上。", "こんにちは", "Кошка сидит", "القطة", "हिन्दी में", "→", "½", "แมว", "", "!?"]
)
def test_an_exact_answer_never_scores_0(text):
    assert rouge_l(text, text) == rouge_l(f" {text}\n", text) == 1.0
    assert text == "" or rouge_l("", text) == 0.0
    assert rouge_l("other words", text or "x") == 0.0


def test_rouge_by_words_of_any_script():
    """2 of 3 signs in common, both ways: F = 2/3. Marks belong to their letter; composed accents do too."""
    assert rouge_l("猫坐上", "猫坐下") == pytest.approx(2 / 3)
    assert words("हिन्दी में") == ["हिन्दी", "में"]
    assert rouge_l("cafe\u0301 noir", "café noir") == 1.0
    assert rouge_l("猫坐上", "猫坐下", "english") == 0.0
    assert rouge_l("→ ←", "→ ↑") == pytest.approx(1 / 2)


@pytest.mark.parametrize(("a", "b"), [("The cat sat.", "the cat is on a mat"), ("x_1 y-2", "X 1 y 2"), ("a.b", "a b")])
def test_unicode_is_english_on_ascii(a, b):
    assert rouge_l(a, b) == rouge_l(a, b, "english")


def test_rouge_between_blanks_by_hand():
    """`The cat. A dog` and `the cat. A dog`: 3 of 4 different words each way, 0.75; case counts. Repeats count once."""
    assert by_blanks("The cat. A dog", "the cat. A dog") == pytest.approx(0.75, abs=1e-6)
    assert by_blanks("a a a b", "a b") == pytest.approx(1.0, abs=1e-6)
    assert by_blanks("b a", "a b") == pytest.approx(0.5, abs=1e-6)  # one of two in order
    assert by_blanks("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5") == pytest.approx(2 * 0.5 * 0.8 / 1.3, abs=1e-6)
    assert by_blanks("", "a") == 0.0


def test_the_tokenizer_is_named_in_the_keys():
    assert Dolly(rouge_tokenizer="english").score("猫", {"response": "猫", "context": ""}) == {"rouge_l": 0.0}
    assert Dolly().score("猫", {"response": "猫", "context": ""}) == {"rouge_l": 1.0}
    assert "rouge_tokenizer" in Dolly.extraction


@pytest.mark.parametrize(
    ("gold", "answer", "strict", "flexible"),
    [
        ("#### 3/8", "\n#### 3/4", 0, 0),
        ("#### 3/8", "\n#### 0.375", 1, 1),
        ("#### 3/8", "so 6/16", 0, 1),
        ("#### -1/2", "#### -.5", 1, 1),
        ("#### 1 080", "#### 1,080", 1, 1),
        ("#### 1\u202f080", "#### 1080", 1, 1),
        ("#### 1,080", "#### 1 080", 1, 0),
        ("#### 4", "it is 3/4", 0, 1),
    ],
)
def test_golds_that_are_fractions_or_have_spaces(gold, answer, strict, flexible):
    score = GSM8K().score(answer, {"question": "?", "answer": gold})
    assert (score["exact_match"], score["exact_match_flexible"]) == (strict, flexible)


@pytest.mark.parametrize("gold", ["#### 1 1/2", "#### 1,08", "#### 3/0", "#### 1e3", "#### 1½", "#### x", "#### 2^10"])
def test_golds_that_are_not_one_number_are_refused_with_their_row(gold, tmp_path):
    rows = [{"question": "?", "answer": "#### 1"}, {"question": "?", "answer": gold}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(FedError, match="test row 2: its answer has no"):
        GSM8K().load(str(tmp_path), "test")


@pytest.mark.parametrize(
    ("answer", "right"),
    [("#### 1080", 1), ("#### 1,080", 1), ("####1080", 0), ("#### $1080", 0), ("#### 1080.00", 0), ("####  1080", 0)],
)
def test_the_published_regex_is_to_the_letter(answer, right):
    assert GSM8K().score(answer, {"question": "?", "answer": "#### 1,080"})["exact_match_published"] == right


def test_flexible_reads_fractions_only_where_the_gold_is_one():
    assert last_number("3/4") == 4 and float(last_number("3/4", fractions=True)) == 0.75


PROBLEM = {
    "task_id": 7,
    "prompt": 'from typing import List\n\n\ndef add(x: int, y: int):\n    """Add."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
}
BODY = "    return x + y\n"
WHOLE = f"def add(x, y):\n{BODY}"


@pytest.mark.parametrize(
    ("answer", "plain", "fenced"),
    [
        (BODY, 1, 1),
        (BODY + "\n\ndef other():\n    pass", 1, 1),
        (f"```python\n{WHOLE}```\nDone.", 0, 1),
        (f"Here you are:\n\n```python\nimport math\n\n{WHOLE}```\n", 0, 1),
        (f"```\n{BODY}```", 0, 1),
        ("```python\nreturn x + y\n```", 0, 1),
        (f"\n{WHOLE}\n\nprint(add(1, 2))", 0, 1),
        (f"import math\n{WHOLE}", 0, 1),
        ("    return x - y\n", 0, 0),
        ("```python\ndef add(x, y):\n    return x - y\n```", 0, 0),
    ],
)
def test_fenced_and_repeated_functions(answer, plain, fenced):
    score = HumanEval(wall_seconds=60).score(answer, PROBLEM)
    assert (score["pass_at_1"], score["pass_at_1_fenced"]) == (plain, fenced), score


@pytest.mark.parametrize(
    ("text", "done"),
    [
        (BODY, False), (BODY + "\ndef g", True), ("```python\ndef add", False), (f"```python\n{WHOLE}", False),
        (f"```python\n{WHOLE}```", True), (f"\n{WHOLE}", False), (f"\n{WHOLE}\n\nprint", True),
    ],
)  # fmt: skip
def test_generation_goes_on_until_both_rules_can_read(text, done):
    assert HumanEval().finished(text) is done


def test_own_problems_without_a_solution_and_with_numbers(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    (row,) = HumanEval().load(str(tmp_path), "test")
    assert row["task_id"] == "7" and HumanEval().target(row) == ""


def test_wilson_by_hand():
    """0 of 24: 0 to z^2 / (n + z^2) = 13.8 %; 64 of 64: 94.3 % to 1 (z = 1.96)."""
    assert wilson(0.0, 24) == (0.0, pytest.approx(0.138, abs=5e-4))
    assert wilson(1.0, 64) == (pytest.approx(0.943, abs=5e-4), 1.0)
    assert wilson(0.5, 1)[0] < 0.5 < wilson(0.5, 1)[1]


@pytest.mark.parametrize("values", [[0.0] * 24, [1.0] * 64, [0.4] * 8, [1.0]])
def test_no_share_has_an_interval_of_no_width(values):
    found = interval(np.array(values), np.ones(len(values)))
    assert found["low"] <= found["value"] <= found["high"] and found["high"] - found["low"] > 0.01


def test_row_numbers_are_the_file_s(tmp_path):
    rows = [{"instruction": f"{i}", "context": "", "response": "r", "category": "a"} for i in range(30)]
    rows[20]["category"] = None
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task, told = Dolly(held_out=8), set()
    for split in ("train", "test"):
        try:
            task.load(str(tmp_path), split)
        except FedError as error:
            told.add(str(error).split(" row ")[1].split(":")[0])
    assert told == {"21"}
