"""Pages from anybody: plain values of bounded size, nothing looked up, every fault one sentence with its line."""

import os
import time

import pytest

from fedllm.commands import sweep
from fedllm.config import plain_yaml
from fedllm.errors import FedError
from fedllm.recipe.page import load
from fedllm.reports import run_record


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("5.0e-3", 5e-3), ("-1E6", -1e6), (".5", 0.5), ("1", 1), ("1_000", 1000), ("true", True),
        ("null", None), ("", None), ("nan", "nan"), ("2026-11-26", "2026-11-26"), ("[a, 1]", ["a", 1]),
        ("'1'", "1"), ("${oc.env:HOME}", "${oc.env:HOME}"), ("1e", "1e"), ("e4", "e4"), ('"\\U0001F600"', "😀"),
        ("\ufeffa: 1\r\n", {"a": 1}), ("0x10", 16), ("1.2.3", "1.2.3"), ("16r", "16r"), ("a: {1: x}", {"a": {1: "x"}}),
    ],
)  # fmt: skip
def test_plain_values(text, value):
    got = plain_yaml.parse(text)
    assert got == value and type(got) is type(value)


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"an alias .*\(line 2\)"),
        ("a: &a [*a]", "an alias"),
        ("a: &a {x: 1}\nb: {<<: *a}", "an alias|<<"),
        ("b: {<<: {x: 1}}", "<< is not taken"),
        ("a: " + "9" * 5000, r"a number of 5000 digits, and 40 are the most \(line 1\)"),
        ("a: 1." + "9" * 5000, "a number of 5002 digits"),
        ("a: !!timestamp 2026-99-99", "constructor for the tag"),
        ("a: !!int x", r"'x' cannot be read as int \(line 1\)"),
        ("a: !!bool x", "'x' cannot be read as bool"),
        ("a: !!float x", "'x' cannot be read as float"),
        ("a: !!binary x", "constructor for the tag"),
        ("a: !!python/object/apply:os.system [id]", "constructor for the tag"),
        ("[" * 900, "more than 32 levels"),
        ("[" * 100_000, "more than 32 levels"),
        ("{a: " * 5000, "more than 32 levels"),
        ("- " * 5000 + "x", "more than 32 levels"),
        ("x" * 600_000, "more than 500000 characters"),
        ("a: 1\na: 2", r"the key a stands twice \(line 2\)"),
        ("a: {b: 1, b: 1}", "the key b stands twice"),
        ("[a]: 1", "unhashable"),
        ('a: "\\ud800"', "half of a surrogate"),
        ('a: "\\0"', "NUL"),
        ("a: 1\n\tb: 2", "line 2"),
        ("a: 1\n---\nb: 2", "single document"),
        ("a: \x00", "unacceptable character"),
        ("a: *b", "an alias"),
    ],
)  # fmt: skip
def test_a_hostile_page_is_one_short_sentence_in_time(text, message):
    began = time.perf_counter()
    with pytest.raises(FedError, match=message) as caught:
        plain_yaml.parse(text)
    assert time.perf_counter() - began < 5
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_too_many_values_are_refused():
    with pytest.raises(FedError, match="more than 50000 values"):
        plain_yaml.parse("[" + "1," * 60_000 + "]")


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    for name, message in (("fifo", "no file"), ("zero", "no file"), ("latin", "UTF-8"), ("none", "cannot be read")):
        with pytest.raises(FedError, match=message):
            plain_yaml.read(tmp_path / f"{name}.yaml")


def page(tmp_path, text):
    (tmp_path / "page.yaml").write_text(text)
    return f"recipe={tmp_path / 'page.yaml'}"


def test_a_recipe_reads_nothing_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "secret-of-mine")
    given = page(tmp_path, "data: {name: word_problems}\nmodel: {name: pico, revision: '${oc.env:SECRET}'}\n")
    recipe = load([given, "run.output=${oc.env:SECRET}/${run.seed}"])
    assert recipe.model.revision == "${oc.env:SECRET}"
    assert recipe.run.output == "${oc.env:SECRET}/${run.seed}"
    assert "secret-of-mine" not in repr(recipe)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("algorithm: {name: [fedhl]}", [], r"algorithm\.name=\['fedhl'\]: give one name, of: .*fedhl"),
        ("data: {name: {a: b}}", [], r"data\.name=\{'a': 'b'\}: give one name"),
        ("data: {name: word_problems}", ["robust.name=[krum]"], r"robust\.name=\['krum'\]: give one name"),
        ("data: {name: word_problems}", ["clients.rank=2", "clients.count=1000000000"], "1000000 clients at most"),
        (
            "data: {name: word_problems}",
            [f"clients.count={2**70}"],
            r"clients\.count=.*whole number up to 2147483647",
        ),
        ("run: {rounds: 99999999999999999999}", [], r"run\.rounds=9+: give a whole number up to"),
        ("data: {name: word_problems, train_rows: 10000000000}", [], r"data\.train_rows=10000000000"),
        ("data: {name: word_problems}", ["clients.rank='8'"], r"is a text: ranks are clients\.rank=\[8\]"),
        ("data: {name: word_problems}", ["clients.rank=16,8,4"], r"ranks are clients\.rank=\[16,8,4\]"),
        ("data: {name: gsm8k}", ["data.prompt_template={prompt}"], r"goes into quotes"),
        ("data: {name: word_problems}", ["data.partition=[]"], "this is a section"),
        ("3: 4", [], "3 is not a key of a recipe"),
    ],
)
def test_recipes_with_odd_values(tmp_path, text, arguments, message):
    with pytest.raises(FedError, match=message) as caught:
        load([page(tmp_path, text), *arguments])
    assert "\n" not in str(caught.value)


def test_a_run_s_page_that_is_a_bomb_is_left_out_of_its_report(tmp_path):
    (tmp_path / "recipe.yaml").write_text(BOMB)
    assert run_record.yaml_in(tmp_path / "recipe.yaml") == {}


def test_a_sweep_that_is_a_bomb_is_refused(tmp_path):
    (tmp_path / "sweep.yaml").write_text("recipe: smoke\nover: {run.seed: [0]}\n" + BOMB)
    with pytest.raises(FedError, match="an alias"):
        sweep.load(str(tmp_path / "sweep.yaml"))


def test_a_sweep_carries_any_text_over(tmp_path):
    (tmp_path / "sweep.yaml").write_text('recipe: smoke\nover: {run.output: ["😀 a: b", "c"]}\n')
    runs = sweep.load(str(tmp_path / "sweep.yaml")).runs
    assert runs[0].recipe.run.output == "😀 a: b"


def test_assignments_merge_and_the_later_wins():
    assert plain_yaml.assignments(["a.b=1", "a.c=[2]", "a.b=x y"]) == {"a": {"b": "x y", "c": [2]}}
    assert plain_yaml.assignments(["a="]) == {"a": ""}
    with pytest.raises(FedError, match="does not fit"):
        plain_yaml.assignments(["a=[1]", "a.b=2"])
