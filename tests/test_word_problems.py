"""The demo's corpus: its arithmetic is right, its rows are distinct, and the same seed gives the same bytes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from fedllm.tasks.word_problems import DIFFICULTIES, TEMPLATES, Template, generate, split

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "data" / "word_problems.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=env)


def value(expression: str) -> Fraction:
    """`x+y` and the like, read anew: nothing is shared with the generator."""
    left, symbol, right = re.fullmatch(r"(\d+)([-+*/])(\d+)", expression).groups()
    x, y = Fraction(left), Fraction(right)
    return {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[symbol]


@pytest.mark.parametrize("seed", [0, 1])
def test_every_note_is_right_and_the_last_one_is_the_answer(seed):
    for row in generate(900, seed):
        *steps, last = row["answer"].split("\n")
        for step in steps:
            ((shown, expression, result, repeated),) = re.findall(r"(\S+) = <<(.+?)=(\d+)>>(\d+)", step)
            assert shown == expression and result == repeated
            assert value(expression) == int(result), step
        assert last == f"#### {result}"


def test_a_worked_example():
    """48 in April, half as many in May: 48/2 = 24, and 48+24 = 72 (GSM8K's first problem)."""
    clips = Template(
        "clips",
        ("{name} sold {a} clips in April and one {b}th of that in May. How many in all?",),
        {"name": ("Ada",), "a": (48,), "b": (2,)},
        ("{name} sold [may = a/b] clips in May.", "{name} sold [all = a+may] clips."),
    )
    (row,) = generate(1, 0, "medium", [clips])
    assert (
        row["answer"] == "Ada sold 48/2 = <<48/2=24>>24 clips in May.\nAda sold 48+24 = <<48+24=72>>72 clips.\n#### 72"
    )


def test_no_placeholder_is_left_over():
    for row in generate(900, 0):
        assert not re.search(r"[{}\[\]]", row["question"] + row["answer"]), row


def test_the_seed_decides_and_fewer_rows_are_the_beginning_of_more():
    assert generate(200, 3) == generate(200, 3)
    assert generate(200, 3) != generate(200, 4)
    assert generate(50, 3) == generate(200, 3)[:50]


def test_train_and_test_share_no_question():
    train, test = split(1500, 300, 0)
    assert (len(train), len(test)) == (1500, 300)
    questions = {row["question"] for row in train + test}
    assert len(questions) == 1800
    assert split(20, 300, 0)[1] == test


def test_every_template_occurs_and_labels_are_balanced():
    rows = generate(600, 0)
    assert {row["template"] for row in rows} == {template.name for template in TEMPLATES}
    assert set(Counter(row["difficulty"] for row in rows).values()) == {200}
    steps = {"easy": {1}, "medium": {2}, "hard": {3, 4}}
    assert all(len(row["answer"].split("\n")) - 1 in steps[row["difficulty"]] for row in rows)


def test_repeated_difficulties_are_weights():
    rows = generate(400, 0, ("easy", "easy", "easy", "medium"))
    assert Counter(row["difficulty"] for row in rows) == {"easy": 300, "medium": 100}
    assert {row["difficulty"] for row in generate(40, 0, "hard")} == {"hard"}


def test_all_distinct_questions_can_be_had_and_not_one_more():
    """Six draws of (a, b); 4/3 leaves a remainder, 2-2 is not above one: four rows remain."""
    tiny = Template(
        "tiny", ("{a} by {b}?",), {"a": (4, 6, 8), "b": (2, 3)}, ("[half = a/b] each.", "[rest = a-half] left.")
    )
    usable = [(4, 2), (6, 2), (6, 3), (8, 2)]
    rows = generate(len(usable), 0, "medium", [tiny])
    assert sorted(row["question"] for row in rows) == [f"{a} by {b}?" for a, b in usable]
    with pytest.raises(ValueError, match="only 4 distinct questions for 5 rows"):
        generate(5, 0, "medium", [tiny])


def test_too_many_questions_are_refused_at_once():
    with pytest.raises(ValueError, match="distinct easy questions are asked for, but there are at most"):
        generate(10**12, 0, "easy")


@pytest.mark.parametrize("bad", [{"rows": -1}, {"difficulty": "heard"}, {"difficulty": ()}])
def test_bad_arguments_are_refused(bad):
    with pytest.raises(ValueError):
        generate(**{"rows": 1, "seed": 0, **bad})


def test_a_template_must_show_what_it_draws():
    with pytest.raises(ValueError, match="{b} is drawn but does not occur"):
        Template("t", ("{a}?",), {"a": (2,), "b": (2, 3)}, ("[c = a+2].",))


def test_the_command_writes_both_files(tmp_path):
    done = run("--train", "30", "--test", "12", "--seed", "5", "--out", str(tmp_path / "new"))
    assert done.returncode == 0, done.stderr
    read = {p.name: [json.loads(line) for line in p.read_text().splitlines()] for p in (tmp_path / "new").iterdir()}
    train, test = split(30, 12, 5)
    assert read == {"train.jsonl": train, "test.jsonl": test}
    assert set(train[0]) == {"question", "answer", "template", "difficulty"}
    assert set(DIFFICULTIES) == {row["difficulty"] for row in test}


@pytest.mark.parametrize(
    "arguments",
    [["--train", "-3"], ["--train", "many"], ["--difficulty", "heard"], ["--train", "1000000000000"], ["--nope"]],
)
def test_the_command_ends_with_one_line_and_2_on_bad_arguments(tmp_path, arguments):
    done = run("--out", str(tmp_path / "out"), *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_names_a_folder_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("--out", str(tmp_path / "file" / "out"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(tmp_path / "file") in done.stderr
