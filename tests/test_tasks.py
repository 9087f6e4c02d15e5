"""Tasks: what is read and what is refused, prompts and targets, and the scores by hand and on the real GSM8K."""

from __future__ import annotations

import gzip
import io
import json
import os
import runpy
import subprocess
import sys
import types
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.data import json_rows
from fedllm.data.sources import read, write_jsonl
from fedllm.errors import FedError
from fedllm.tasks import TEXTS
from fedllm.tasks.alpaca import Alpaca
from fedllm.tasks.gsm8k import GSM8K, WordProblems, last_number, marked_number
from fedllm.tasks.images import MNIST

ROOT = Path(__file__).parents[1]
ROWS = [
    {"question": f"What is {i} + 1?", "answer": f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"} for i in range(20)
]


@pytest.fixture
def gsm8k(data_dir: Path) -> Path:
    folder = data_dir / "gsm8k"
    if not (folder / "test.jsonl").is_file() or not (folder / "train.jsonl").is_file():
        pytest.skip(f"no GSM8K: {folder} has not train.jsonl and test.jsonl.")
    return folder


def written(path: Path, rows) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("She has 3 * 4 = 12 eggs.\n#### 12", 12, 12),
        ("#### 1,080", 1080, 1080),
        ("#### 109,200,000", 109200000, 109200000),
        ("#### -5", -5, -5),
        ("#### \u22125", -5, -5),
        ("#### $18", 18, 18),
        ("#### $ 18.00.", 18, 18),
        ("#### -$5", -5, -5),
        ("#### $-5", -5, -5),
        ("#### 2.5", Decimal("2.5"), Decimal("2.5")),
        ("#### .5", Decimal("0.5"), Decimal("0.5")),
        ("####7.", 7, 7),
        ("#### 7 eggs a day", 7, 7),
        ("####\n7", 7, 7),
        ("#### 7\n#### 8", 7, 8),  # what it said first counts
        ("#### none\n#### 8", 8, 8),
        ("#### the answer is 8", None, 8),
        ("The answer is $1,450,000.", None, 1450000),
        ("The answer is 42.", None, 42),
        ("It is between 16-3.", None, 3),  # a range, not minus three
        ("so 10 - 4 = 6", None, 6),
        ("That leaves -6", None, -6),
        ("(-6)", None, -6),
        ("(2)-6", None, 6),
        ("\\boxed{18}", None, 18),
        ("**18**", None, 18),
        ("18%", None, 18),
        ("1,2,3", None, 3),
        ("1,2345", None, 2345),  # no thousands
        ("12,345,67", None, 67),
        ("1.080", None, Decimal("1.08")),
        ("about 3.5.", None, Decimal("3.5")),
        ("eighteen", None, None),
        ("", None, None),
        ("####", None, None),
        ("#### -", None, None),
        ("\u0663", None, None),  # an Arabic digit three: outside the format
    ],
)
def test_which_number_an_answer_gives(text, strict, flexible):
    assert marked_number(text) == strict
    assert last_number(text) == flexible


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "{}.", "{}.00", "{:,} dollars"]))
def test_every_whole_number_is_read_back(number, form):
    assert marked_number("#### " + form.format(number)) == number
    assert last_number("so it is " + form.format(number)) == number


@given(st.text(alphabet="0123456789,.-$# \n", max_size=200))
def test_no_text_breaks_the_extraction(text):
    assert marked_number(text) is None or "####" in text
    assert (last_number(text) is None) == (not any(c.isdigit() for c in text))


def test_an_answer_of_ten_thousand_digits_is_only_wrong():
    assert GSM8K().score("#### " + "1" * 10_000, ROWS[0])["exact_match"] == 0.0


def test_a_score_by_hand():
    """Gold 3. `#### 3` is right twice; `3 eggs` only loosely; `#### 3, of 4` only strictly; `4` never."""
    task, row = GSM8K(), ROWS[2]
    scores = [task.score(text, row) for text in (" So\n#### 3", " 3 eggs", " #### 3, of 4", " 4")]
    assert [score["exact_match"] for score in scores] == [1, 0, 1, 0]
    assert [score["exact_match_flexible"] for score in scores] == [1, 1, 0, 0]
    assert task.summary(scores) == {"exact_match": 0.5, "exact_match_flexible": 0.5, "exact_match_published": 0.5}
    assert tuple(scores[0]) == task.metrics


def test_a_question_that_the_model_asks_itself_does_not_count():
    said = " 2 + 1 = 3\n#### 3\n\nQuestion: What is 5 + 5?\nAnswer: 10\n#### 10"
    assert list(GSM8K().score(said, ROWS[2]).values()) == [1.0, 1.0, 1.0]
    assert list(GSM8K(stop=()).score(said, ROWS[2]).values()) == [1.0, 0.0, 1.0]


def test_a_row_without_a_gold_number_is_never_scored():
    """No number on both sides would be equal."""
    with pytest.raises(FedError, match="####"):
        GSM8K().score("I do not know", {"question": "?", "answer": "I do not know"})


def test_the_real_test_answers_score_all_points_against_themselves(gsm8k):
    task = GSM8K()
    rows = task.load(str(gsm8k), "test")
    assert len(rows) == task.rows["test"] == 1319
    assert task.summary([task.score(task.target(row), row) for row in rows]) == {
        "exact_match": 1.0,
        "exact_match_flexible": 1.0,
        "exact_match_published": 1.0,
    }
    others = [*rows[1:], rows[0]]
    assert (
        task.summary([task.score(task.target(row), other) for row, other in zip(rows, others, strict=True)])[
            "exact_match"
        ]
        < 0.1
    )


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_real_gold_numbers_are_those_after_the_last_mark(gsm8k, split):
    """By another route: the text after the last ####, without commas, as Python reads numbers."""
    rows = GSM8K().load(str(gsm8k), split)
    assert len(rows) == GSM8K().rows[split]
    for row in rows:
        assert marked_number(row["answer"]) == float(row["answer"].rsplit("####", 1)[1].replace(",", ""))


def test_prompt_and_target_read_as_one_text():
    task = GSM8K()
    assert task.prompt(ROWS[1]) == "Question: What is 1 + 1?\nAnswer:"
    assert task.target(ROWS[1]) == " 1 + 1 = <<1+1=2>>2\n#### 2"
    other = GSM8K(prompt_template="### Q\n{question}\n### A\n", target_template="{answer}")
    assert other.prompt(ROWS[1]) + other.target(ROWS[1]) == "### Q\nWhat is 1 + 1?\n### A\n1 + 1 = <<1+1=2>>2\n#### 2"


def test_braces_in_the_data_are_text():
    row = {"question": "{answer} {0} {x.__class__}", "answer": "{}\n#### 1"}
    assert GSM8K().prompt(row) == "Question: {answer} {0} {x.__class__}\nAnswer:"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("Question: {question", "expected '}'"),
        ("{} {question}", "names no column"),
        ("{0}", "names no column"),
        ("{question.__class__}", "names no column"),
        ("{question[0]}", "names no column"),
        ("Question:", "every row would read the same"),
    ],
)
def test_a_template_that_cannot_work_is_refused_at_once(template, says):
    with pytest.raises(FedError, match="prompt_template") as error:
        GSM8K(prompt_template=template)
    assert says in str(error.value)


def test_a_template_may_use_any_column_that_the_rows_have(tmp_path):
    task = GSM8K(prompt_template="{contxt}: {question}")
    rows = [{**row, "context": "Sums"} for row in ROWS]
    with pytest.raises(FedError, match="row 1: there is no column 'contxt'. Did you mean 'context'?"):
        task.load(str(written(tmp_path / "train.jsonl", rows)), "train")
    assert GSM8K(prompt_template="{context}: {question}").prompt(rows[0]) == "Sums: What is 0 + 1?"


def test_every_form_of_file_gives_the_same_rows(tmp_path):
    rows = [
        *ROWS,
        {"question": "a\u2028b \u00e9", "answer": "#### 1"},
    ]  # U+2028 ends a line for str.splitlines, not in JSON
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    forms = {
        "lines.jsonl": lines.encode(),
        "crlf.jsonl": lines.replace("\n", "\r\n").encode() + b"\r\n\r\n",
        "bom.jsonl": b"\xef\xbb\xbf" + lines.encode(),
        "lines.json": lines.encode(),
        "list.json": json.dumps(rows, indent=1).encode(),
        "list.json.gz": gzip.compress(json.dumps(rows).encode()),
        "lines.jsonl.gz": gzip.compress(lines.encode()),
    }
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        assert GSM8K().load(str(tmp_path / name), "train") == rows, name


def test_a_folder_has_its_splits(tmp_path):
    written(tmp_path / "train.jsonl", ROWS[:15])
    written(tmp_path / "test.jsonl", ROWS[15:])
    assert GSM8K().load(str(tmp_path), "train") == ROWS[:15]
    assert GSM8K().load(str(tmp_path), "test") == ROWS[15:]
    assert GSM8K(held_out=3).load(str(tmp_path), "train") == ROWS[:15]  # it has a test split of its own
    assert GSM8K().load(str(tmp_path / "test.jsonl"), "test") == ROWS[15:]


def test_held_out_rows_are_not_trained_on_and_do_not_depend_on_the_order_of_the_file(tmp_path):
    task = GSM8K(held_out=6)
    forward = str(written(tmp_path / "a.jsonl", ROWS))
    backward = str(written(tmp_path / "b.jsonl", ROWS[::-1]))
    train, test = task.load(forward, "train"), task.load(forward, "test")
    assert len(test) == 6 and len(train) == 14
    assert sorted(train + test, key=ROWS.index) == ROWS
    assert task.load(backward, "test") == test[::-1]
    assert GSM8K(held_out=6, held_out_seed=1).load(forward, "test") != test


@pytest.mark.parametrize(
    ("name", "content", "split", "says"),
    [
        ("train.jsonl", "", "train", "is empty: there is nothing to train on"),
        ("train.jsonl", "\n\n", "train", "is empty"),
        ("train.json", "[]", "train", "is empty"),
        ("train.jsonl", '{"question": "q", "answer": "#### 1"}\n{"question": ', "train", "line 2: not JSON"),
        ("train.json", '{\n"question": "q"\n}', "train", "line 1: not JSON"),
        ("train.json", "[" * 100_000, "train", "not JSON"),
        ("train.jsonl", '{"question": "q", "answer": "#### 1"}\n[1, 2]', "train", "row 2: a row is a JSON object"),
        ("train.jsonl", '{"qestion": "q", "answer": "#### 1"}', "train", "Did you mean 'qestion'?"),
        ("train.jsonl", '{"question": "q", "answer": 4}', "train", "'answer' holds '4', and text is needed"),
        ("train.jsonl", '{"question": "q", "answer": "four"}', "train", "row 1: its answer has no '#### number'"),
        ("train.jsonl.gz", "no gzip", "train", "cannot be read"),
        ("train.jsonl", '{"question": "q", "answer": "#### 1"}', "test", "only training rows"),
        ("test.jsonl", '{"question": "q", "answer": "#### 1"}', "train", "only test rows"),
    ],
)
def test_a_file_that_cannot_be_used_is_said_in_one_sentence(tmp_path, name, content, split, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(FedError) as error:
        GSM8K().load(str(tmp_path / name), split)
    assert says in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'{"question": "caf\xe9"}')
    with pytest.raises(FedError, match="not UTF-8"):
        read(tmp_path / "train.jsonl")


def test_a_misspelt_path_is_answered_with_the_nearest_one(tmp_path):
    written(tmp_path / "gsm8k" / "train.jsonl", ROWS)
    for wrong, right in [
        ("gsm8k/trian.jsonl", "gsm8k/train.jsonl"),
        ("gsmk8/train.jsonl", "gsm8k"),
        ("gms8k", "gsm8k"),
    ]:
        with pytest.raises(FedError) as error:
            GSM8K().load(str(tmp_path / wrong), "train")
        assert f"Did you mean {tmp_path / right}?" in str(error.value)
    with pytest.raises(FedError, match="has nothing of a name like zzz"):
        GSM8K().load(str(tmp_path / "zzz"), "train")


def test_a_folder_without_splits_names_what_it_has(tmp_path):
    written(tmp_path / "dolly.jsonl", ROWS)
    with pytest.raises(FedError, match="JSON files there: dolly.jsonl"):
        GSM8K().load(str(tmp_path), "train")
    written(tmp_path / "train.jsonl", ROWS)
    written(tmp_path / "train.json", ROWS)
    with pytest.raises(FedError, match="train.jsonl and train.json: which"):
        GSM8K().load(str(tmp_path), "train")


@pytest.mark.parametrize("held_out", [20, 21])
def test_more_cannot_be_held_out_than_leaves_a_row_to_train_on(tmp_path, held_out):
    with pytest.raises(FedError, match=f"held_out={held_out}: it must be .* less than the 20 rows"):
        GSM8K(held_out=held_out).load(str(written(tmp_path / "rows.jsonl", ROWS)), "train")


def test_a_path_inside_the_data_is_only_text(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret words")
    row = {
        "question": str(secret),
        "answer": "#### 1",
        "path": str(secret),
        "image": {"path": str(secret), "bytes": None},
    }
    loaded = GSM8K().load(str(written(tmp_path / "train.jsonl", [row])), "train")
    assert loaded == [row] and "secret words" not in GSM8K().prompt(loaded[0])


def test_labels_come_from_a_column_that_exists():
    task, row = WordProblems(), {"template": "packs", "difficulty": 2, "steps": [1], "nothing": None}
    assert task.label(row, "template") == "packs" and task.label(row, "difficulty") == 2
    with pytest.raises(FedError, match="no column 'dificulty'.* Did you mean 'difficulty'?"):
        task.label(row, "dificulty")
    for column in ("steps", "nothing"):
        with pytest.raises(FedError, match="a label is text or a whole number"):
            task.label(row, column)


def test_word_problems_need_no_path_and_their_splits_share_no_question():
    task = WordProblems(train_rows=60, test_rows=20, difficulty=("easy", "hard"), generator_seed=3)
    train, test = task.load(None, "train"), task.load(None, "test")
    assert (len(train), len(test)) == (60, 20) == (task.rows["train"], task.rows["test"])
    assert not {row["question"] for row in train} & {row["question"] for row in test}
    assert {row["difficulty"] for row in train} == {"easy", "hard"}
    assert task.summary([task.score(task.target(row), row) for row in test])["exact_match"] == 1.0
    assert WordProblems(train_rows=60, test_rows=20, generator_seed=4).load(None, "test") != test


def test_word_problems_can_be_read_from_files_too(tmp_path):
    assert WordProblems().load(str(written(tmp_path / "train.jsonl", ROWS)), "train") == ROWS


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"difficulty": ("heard",)}, "heard"),
        ({"train_rows": -1}, "-1"),
        ({"train_rows": 0}, "train split of the generated word problems is empty"),
        ({"train_rows": 10**12}, "distinct"),
    ],
)
def test_word_problems_that_cannot_be_made_are_refused(fields, says):
    with pytest.raises(FedError, match=says):
        WordProblems(**fields).load(None, "train")


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_every_task_of_the_table_says_what_it_is(name):
    task = TEXTS[name]()
    assert task.rows["train"] > task.rows["test"] > 0
    assert task.metrics and task.extraction and task.max_new_tokens > 0


class Split(list):
    def to_list(self):
        return list(self)


def fake_hub(monkeypatch, answer):
    """Puts a stand-in for the `datasets` package in place, whose load_dataset is ``answer``."""
    module = types.ModuleType("datasets")
    module.load_dataset = answer
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_without_a_path_the_rows_are_the_hubs(monkeypatch):
    asked = []

    def load_dataset(name, subset, revision=None):
        asked.append((name, subset, revision))
        return {"train": Split(ROWS[:15]), "test": Split(ROWS[15:])}

    fake_hub(monkeypatch, load_dataset)
    assert GSM8K().load(None, "train") == ROWS[:15]
    assert GSM8K(hub="me/mine", subset=None, revision="abc").load(None, "test") == ROWS[15:]
    assert asked == [("openai/gsm8k", "main", None), ("me/mine", None, "abc")]


def test_a_hub_that_cannot_be_reached_is_said_with_the_remedy():
    """Through the real library, told to stay offline."""
    with pytest.raises(FedError) as error:
        GSM8K(hub="nobody/none-such").load(None, "train")
    assert "nobody/none-such" in str(error.value) and "data.path=FOLDER" in str(error.value)
    assert "\n" not in str(error.value)


def test_without_the_hubs_library_local_files_are_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FedError, match="'datasets' is not installed. .*data.path="):
        GSM8K().load(None, "train")


def test_the_hubs_library_is_not_imported_for_local_rows(tmp_path):
    path = written(tmp_path / "train.jsonl", ROWS)
    code = f"import sys; from fedllm.tasks import TASKS; TASKS['gsm8k']().load({str(path)!r}, 'train'); "
    code += "TASKS['word_problems']().load(None, 'test'); sys.exit('datasets' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_files_are_written_all_or_none(tmp_path):
    train, test = tmp_path / "new" / "train.jsonl", tmp_path / "new" / "test.jsonl"
    write_jsonl({train: ROWS, test: ROWS[:2]})
    assert (read(train), read(test)) == (ROWS, ROWS[:2])
    with pytest.raises(TypeError):
        write_jsonl({train: ROWS[:1], test: [{"question": object()}]})
    assert (read(train), read(test)) == (ROWS, ROWS[:2])
    assert sorted(entry.name for entry in train.parent.iterdir()) == ["test.jsonl", "train.jsonl"]


@pytest.fixture
def fetch(monkeypatch, capsys):
    """Runs data/gsm8k.py as the command that it is; gives its exit status and what it printed to stderr."""

    def run(folder: Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["gsm8k.py", "--out", str(folder)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "data" / "gsm8k.py"), run_name="__main__")
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


@pytest.mark.parametrize("tests", [1319, 7])
def test_the_fetched_files_load_as_they_came_or_are_not_written(monkeypatch, fetch, tmp_path, tests):
    row = {"question": "caf\u00e9?", "answer": "#### 1"}
    fake_hub(monkeypatch, lambda *_, **__: {"train": Split([row] * 7473), "test": Split([row] * tests)})
    status, said = fetch(tmp_path / "new")
    if tests == 1319:
        assert status == 0 and said == ""
        assert GSM8K().load(str(tmp_path / "new"), "train") == [row] * 7473
        assert GSM8K().load(str(tmp_path / "new"), "test") == [row] * 1319
    else:
        assert status == 2 and "7 rows for test.jsonl, and GSM8K has 1319" in said
        assert not (tmp_path / "new").exists()


def test_the_command_ends_with_one_line_and_2_without_the_hub(fetch, tmp_path):
    status, said = fetch(tmp_path / "out")
    assert status == 2 and said.count("\n") == 1 and "could not be had from the Hub" in said
    assert not (tmp_path / "out").exists()


# --- hostile and odd files of rows


def test_only_a_regular_file_is_read(tmp_path):
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("zero.jsonl", "pipe.jsonl"):
        with pytest.raises(FedError, match=f"{name} is no regular file"):
            GSM8K().load(str(tmp_path / name), "train")


def test_a_row_longer_than_any_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "LONGEST_ROW", 1000)
    rows = [*ROWS, {"question": "a" * 1000, "answer": "#### 1"}]
    with pytest.raises(FedError, match=f"line {len(rows)} has more than 1000 bytes"):
        GSM8K().load(str(written(tmp_path / "train.jsonl", rows)), "train")
    (tmp_path / "list.json").write_text(json.dumps(ROWS))  # one line, and many rows
    assert GSM8K().load(str(tmp_path / "list.json"), "train") == ROWS
    bomb = gzip.compress(b'{"question": "' + b"a" * 10**7)
    (tmp_path / "bomb.jsonl.gz").write_bytes(bomb)
    with pytest.raises(FedError, match="line 1 has more than 1000 bytes"):
        GSM8K().load(str(tmp_path / "bomb.jsonl.gz"), "train")
    monkeypatch.setattr(json_rows, "LONGEST_LIST", 1000)
    with pytest.raises(FedError, match="one JSON list of more than 1000 bytes"):
        GSM8K().load(str(tmp_path / "list.json"), "train")


def test_rows_under_a_key_are_read_and_two_lists_are_not(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps({"version": 1, "data": ROWS}, indent=1))
    assert GSM8K().load(str(tmp_path / "train.json"), "train") == ROWS
    (tmp_path / "train.json").write_text(json.dumps({"easy": ROWS[:1], "hard": ROWS[1:3]}))
    with pytest.raises(FedError, match=r"several lists of rows: easy \(1\), hard \(2\)"):
        GSM8K().load(str(tmp_path / "train.json"), "train")


def test_a_comma_at_a_line_s_end_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + ",\n" for row in ROWS))
    with pytest.raises(FedError, match="line 1: the line ends in a comma"):
        GSM8K().load(str(tmp_path / "train.jsonl"), "train")


@pytest.mark.parametrize("form", ["\\ud83d", "\\uDC00", "\\ud83d\\ud83d"])
def test_half_a_character_is_named_and_a_whole_one_is_text(tmp_path, form):
    good = '{"question": "\\ud83d\\ude00", "answer": "#### 1"}\n'
    (tmp_path / "train.jsonl").write_text(good + f'{{"question": "a{form}b", "answer": "#### 1"}}\n')
    with pytest.raises(FedError, match="line 2: .* is half a character"):
        GSM8K().load(str(tmp_path / "train.jsonl"), "train")
    (tmp_path / "train.jsonl").write_text(good)
    assert GSM8K().load(str(tmp_path / "train.jsonl"), "train")[0]["question"] == "\U0001f600"


def test_none_and_a_missing_column_are_the_empty_input(tmp_path):
    rows = [{"instruction": "Say a.", "input": None, "output": "a"}, {"instruction": "Say b.", "output": "b"}]
    task = Alpaca(held_out=0)
    loaded = task.load(str(written(tmp_path / "train.jsonl", rows)), "train")
    plain = [task.prompt({"instruction": row["instruction"], "input": "", "output": ""}) for row in rows]
    assert [task.prompt(row) for row in loaded] == plain
    for bad in ({"instruction": None, "output": "a"}, {"instruction": "a", "output": None}, {"instruction": "a"}):
        with pytest.raises(FedError, match="row 1: .*'(instruction|output)'"):
            task.load(str(written(tmp_path / "train.jsonl", [bad])), "train")


def test_templates_demand_the_columns_that_they_name_and_no_others(tmp_path):
    rows = [{"asked": f"Say {n}.", "said": str(n)} for n in range(4)]
    path = str(written(tmp_path / "train.jsonl", rows))
    task = Alpaca(held_out=0, prompt_template="{asked}", target_template="{said}")
    assert [task.prompt(row) + task.target(row) for row in task.load(path, "train")][1] == "Say 1.1"
    with pytest.raises(FedError, match="no column 'asked_'. Did you mean 'asked'"):
        Alpaca(held_out=0, prompt_template="{asked_}", target_template="{said}").load(path, "train")


def test_an_image_set_in_several_files_is_read_whole_or_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    def put(name, labels):
        pictures = []
        for label in labels:
            held = io.BytesIO()
            Image.new("L", (28, 28), label).save(held, "PNG")
            pictures.append({"bytes": held.getvalue(), "path": None})
        pq.write_table(pa.table({"image": pictures, "label": labels}), tmp_path / name)

    for part in range(3):
        put(f"train-0000{part}-of-00003.parquet", [part, part + 3])
    assert sorted(MNIST().labels(str(tmp_path), "train", None, 0)) == [0, 1, 2, 3, 4, 5]
    examples = MNIST().load(str(tmp_path), "train", None, 0)
    assert sorted(examples.y.tolist()) == [0, 1, 2, 3, 4, 5]
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(FedError, match="part 1 of 3 of train is missing"):
        MNIST().labels(str(tmp_path), "train", None, 0)
    put("train.parquet", [9])
    with pytest.raises(FedError, match="several sets of train rows"):
        MNIST().labels(str(tmp_path), "train", None, 0)
