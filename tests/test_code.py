"""Code Alpaca and HumanEval: what is run for an answer, labels by language, and the permission it takes."""

import json
from collections import Counter

import pytest

from fedllm.errors import FedError
from fedllm.federation.build import build_federation
from fedllm.recipe import load
from fedllm.sandbox.runner import missing_guarantees
from fedllm.tasks.code import LANGUAGES, CodeAlpaca, HumanEval, RosettaAlpaca

ROWS = [
    {"instruction": "Write a loop in C++.", "input": "", "output": "for (;;) {}"},
    {"instruction": "Add in Python.", "input": "1 and 2", "output": "1 + 2"},
]


@pytest.fixture(scope="module")
def problems():
    return HumanEval().load(None, "test")


@pytest.fixture
def isolated():
    if missing_guarantees():
        pytest.skip(f"this platform does not isolate programs: {missing_guarantees()}")


def test_the_problems_of_the_package_are_all_there(problems, data_dir):
    assert len(problems) == 164 == HumanEval().rows["test"]
    assert HumanEval().load(str(data_dir / "humaneval"), "test") == problems
    assert HumanEval().load(str(data_dir / "humaneval" / "HumanEval.jsonl.gz"), "test") == problems
    with pytest.raises(FedError, match="nothing to train on"):
        HumanEval().load(None, "train")


def test_an_answer_ends_where_the_function_does(problems):
    row = problems[0]
    said = row["canonical_solution"] + "\nprint('done')\nraise SystemExit"
    source = HumanEval().program(said, row).source
    assert source.startswith(row["prompt"]) and "done" not in source and "SystemExit" not in source


def test_scores_of_right_wrong_and_endless_answers(problems, isolated):
    row, task = problems[0], HumanEval(wall_seconds=2.0)
    answers = [row["canonical_solution"], "    return None\n", "    while True: pass\n", "    return ((\n"]
    scores = task.score_all(answers, [row] * 4)
    assert [score["pass_at_1"] for score in scores] == [1, 0, 0, 0]
    assert [score["outcome"].split(":")[0] for score in scores] == ["passed", "failed", scores[2]["outcome"], "failed"]
    assert task.summary(scores) == {"pass_at_1": 0.25, "pass_at_1_fenced": 0.25}
    assert task.score(answers[0], row)["pass_at_1"] == 1


def test_code_alpaca_trains_on_instructions_and_is_tested_on_problems(tmp_path, problems, isolated):
    (tmp_path / "new.json").write_text(json.dumps(ROWS))
    task = CodeAlpaca()
    train, test = task.load(str(tmp_path / "new.json"), "train"), task.load(str(tmp_path / "new.json"), "test")
    assert train == ROWS and test == problems
    assert "### Input:\n1 and 2" in task.prompt(train[1]) and task.target(train[0]) == "for (;;) {}"
    assert task.prompt(test[0]) == test[0]["prompt"] and task.target(test[0]) == test[0]["canonical_solution"]
    assert task.score_all([test[0]["canonical_solution"]], test[:1])[0]["pass_at_1"] == 1


@pytest.mark.parametrize(
    ("said", "language"),
    [
        ("Write it in C++.", "C++"),
        ("a c# class", "C#"),
        ("a program in C that sorts", "C"),
        ("javascript code", "other"),
        ("java code", "Java"),
        ("Go to the shop", "other"),
        ("write a function in Go", "Go"),
        ("a golang server", "Go"),
        ("PHP page", "PHP"),
        ("python", "Python"),
        ("vitamin C's role", "other"),
        ("a loop", "other"),
    ],
)
def test_the_language_that_an_instruction_names(said, language):
    assert CodeAlpaca().label({"instruction": said, "input": "", "output": ""}, "language") == language


def test_the_real_rows_and_their_languages(data_dir):
    task = CodeAlpaca()
    rows = task.load(str(data_dir / "codealpaca" / "new_codealpaca.json"), "train")
    assert len(rows) == 4535
    counts = Counter(task.label(row, "language") for row in rows)
    assert counts["Python"] > 1000 and counts["C++"] > 700 and set(counts) <= {*LANGUAGES, "other"}


def test_the_file_with_languages_has_them_in_its_input(tmp_path):
    rows = [ROWS[0] | {"input": name} for name in ("Scala", "Go", "x86-64 Assembly")]
    (tmp_path / "rosetta.json").write_text(json.dumps(rows))
    task = RosettaAlpaca()
    kept = task.load(str(tmp_path / "rosetta.json"), "train")
    assert [task.label(row, "language") for row in kept] == ["Scala", "Go"]  # the paper's nine; assembly is none
    (tmp_path / "other.json").write_text(json.dumps(ROWS))
    with pytest.raises(FedError, match="not the file with languages"):
        task.load(str(tmp_path / "other.json"), "train")


def test_the_recipe_and_its_hundred_clients():
    from tests.test_dolly import recipe_header

    recipe = load(["recipe=fedhl_codealpaca"])
    assert (recipe.run.rounds, recipe.worker.epochs, recipe.worker.learning_rate) == (10, 1, 2e-4)
    many = load(["recipe=fedhl_codealpaca", *recipe_header("fedhl_codealpaca")])
    assert many.data_name == "rosetta_alpaca" and many.data.partition.column == "language"
    assert (len(many.clients.ranks()), many.clients.participation, many.run.rounds) == (100, 0.15, 20)


def test_a_run_needs_permission_before_it_loads_anything():
    recipe = load(["recipe=fedhl_codealpaca"])
    with pytest.raises(FedError, match="eval.allow_code_execution=true"):
        build_federation(recipe)
