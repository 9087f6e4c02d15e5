"""Alpaca: prompts with and without an input, the answer's score, and the real rows."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import FedError
from fedllm.recipe import load
from fedllm.tasks.alpaca import Alpaca
from fedllm.tasks.rouge import rouge_l

ROW = {"instruction": "Add.", "input": "1 and 2", "output": "It is three"}


def longest_common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, by the textbook's table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def by_hand(generated: str, target: str) -> float:
    """Rouge-L F: lower case, letters and digits; 2 P R / (P + R) of the longest common subsequence (Lin, 2004)."""
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (generated, target))
    common = longest_common(a, b)
    return 2 * common / (len(a) + len(b)) if common else 0.0


def test_rouge_l_by_hand():
    """`the cat sat` and `the cat is on a mat`: 2 words in common, P = 2/3, R = 2/6, F = 4/9."""
    assert rouge_l("The cat sat.", "the cat is on a mat") == pytest.approx(4 / 9)
    assert rouge_l("", "anything") == rouge_l("other words", "anything") == 0
    assert rouge_l("Same words!", "same words") == 1


@given(*[st.lists(st.sampled_from(["a", "B", "cats", "cat", "12", "..."]), max_size=12).map(" ".join)] * 2)
def test_rouge_l_is_the_textbooks(generated, target):
    assert rouge_l(generated, target, "english") == pytest.approx(by_hand(generated, target))


def test_the_prompt_shows_an_input_only_where_there_is_one():
    task = Alpaca()
    assert "### Input:\n1 and 2\n\n### Response:" in task.prompt(ROW)
    bare = task.prompt(ROW | {"input": "  "})
    assert "### Input" not in bare and bare.endswith("### Instruction:\nAdd.\n\n### Response:\n")


def test_what_the_model_says_after_its_answer_does_not_count():
    said = "It is three\n\n### Instruction:\nAdd 2 and 3."
    assert Alpaca().score(said, ROW) == {"rouge_l": 1.0}
    assert Alpaca(stop=()).score(said, ROW)["rouge_l"] < 1


def test_a_template_with_an_unknown_column_is_refused(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps([ROW] * 3))
    with pytest.raises(FedError, match="no column 'inputs'.* Did you mean 'input'"):
        Alpaca(prompt_with_input="{inputs}", held_out=1).load(str(tmp_path), "train")


def test_the_real_rows_load_and_held_out_ones_are_not_trained_on(data_dir):
    path = str(data_dir / "alpaca" / "alpaca_subset_7407.json")
    task = Alpaca(held_out=100)
    train, test = task.load(path, "train"), task.load(path, "test")
    assert (len(train), len(test)) == (7307, 100)
    assert not {json.dumps(row) for row in train} & {json.dumps(row) for row in test}
    assert task.rows == {"train": 51902, "test": 100}


def test_the_recipe_is_the_papers_setting():
    """Appendix C.1 of FedLoRU and figure 3: ten clients, half a round, one epoch, batches of 16, alpha = 16, rank 8."""
    recipe = load(["recipe=fedloru_alpaca"])
    assert len(recipe.clients.ranks()) == 10 and set(recipe.clients.ranks()) == {8}
    assert (recipe.clients.participation, recipe.worker.epochs, recipe.worker.batch_size) == (0.5, 1, 16)
    assert recipe.worker.scale(8) == 16 and recipe.algorithm.tau == 15 and not recipe.eval.generate


def test_every_fetch_command_says_in_one_line_what_it_cannot_have(tmp_path, capsys):
    """Offline: the library is told so by conftest.py."""
    import runpy

    for name, at_the_hub in {"alpaca": True, "dolly": True, "codealpaca": True, "humaneval": False}.items():
        module = runpy.run_path(str(Path(__file__).parents[1] / "data" / f"{name}.py"))
        folder = tmp_path / name
        if at_the_hub:
            with pytest.raises(SystemExit) as ended:
                module["main"](["--out", str(folder)])
            said = capsys.readouterr().err
            assert ended.value.code == 2 and said.count("\n") == 1 and "could not be had" in said
            assert not folder.exists()
        else:
            assert module["main"](["--out", str(folder)]) == 0
            assert len((folder / "test.jsonl").read_text().splitlines()) == 164
