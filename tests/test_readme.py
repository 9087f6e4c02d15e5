"""The README and the page of results say what the kept runs say; the example of a rule works as written."""

import json
import re
from pathlib import Path

import pytest
import torch

from fedllm.algorithms import ALGORITHMS
from fedllm.commands.methods import table
from fedllm.core import Client, Model, Reply, Round
from fedllm.lowrank import LowRank
from fedllm.recipe.page import find
from fedllm.reports.report import summary_table

ROOT = Path(__file__).parents[1]
README, RESULTS, RULE = (
    (ROOT / name).read_text() for name in ("README.md", "results/README.md", "docs/adding_an_algorithm.md")
)


def between(mark: str) -> str:
    found = re.search(rf"<!-- {mark}[^>]*-->\n?(.*?)<!-- /{mark} -->", README + RESULTS + RULE, re.DOTALL)
    assert found, mark
    return found[1]


def test_the_table_of_methods_has_every_rule():
    assert [re.match(r"\| `(\w+)`", line)[1] for line in table().splitlines()[2:]] == list(ALGORITHMS)


def test_its_first_screen_is_short_and_never_names_the_index():
    """Another project owns the bare name on the public index."""
    assert len(README.split()) < 1000
    for page in [README, RESULTS, *(path.read_text() for path in (ROOT / "docs").glob("*.md"))]:
        assert not re.search(r"pip install [\"']?fedllm", page)


@pytest.mark.parametrize(("mark", "folder"), [("demo", "demo"), ("gsm8k", "gsm8k_cpu")])
def test_its_scores_are_those_of_the_run_kept_in_results(mark, folder):
    summary = json.loads((ROOT / "results" / folder / "summary.json").read_text())
    assert summary_table(summary) in between(mark)


def test_the_server_s_times_are_those_kept_in_results():
    lines = json.loads((ROOT / "results/server_decaying.json").read_text())["results"]
    ours = {line["round"]: line["seconds"] for line in lines if line["who"] == "ours"}
    dense = {line["round"]: line["ratio"] for line in lines if line["who"] == "(a) dense svd"}
    said = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", between("server").replace("two", ""))]
    assert said == [round(ours[1], 1), 1, round(ours[20]), 20, round(dense[1]), round(dense[20])]


def test_its_comparison_of_rules_is_the_one_kept_in_results():
    page = (ROOT / "results/demo_rules/compare.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", between("rules"), re.MULTILINE)
    assert len(tables) == 2 and all(one in page for one in tables)


def test_files_pictures_and_recipes_that_it_names_exist():
    for folder, page in ((ROOT, README), (ROOT / "results", RESULTS)):
        for path in re.findall(r"\]\(((?!http)[^)#]+)\)", page):
            assert (folder / path).is_file(), path
    for name in re.findall(r"recipe=(\w+)", README + RESULTS):
        if name != "NAME":
            find(name)


def test_the_example_rule_works_as_written():
    """Norms 1, 1 and 100, median 1, equal rows: (1 + 1 + 1) / 3 = 1 where FlexLoRA serves (1 + 1 + 100) / 3 = 34."""
    code = re.search(r"```python\n(.*?)```", between("example"), re.DOTALL)[1]
    assert len(code.splitlines()) <= 40
    module: dict = {"__name__": "clipped"}
    exec(compile(code, "README.md", "exec"), module)
    served = {}
    for rule in (module["ClippedFlexLoRA"](), ALGORITHMS["flexlora"]()):
        clients = [Client(f"c{i}", 10, 1) for i in range(3)]
        state = rule.init(Model({"w": torch.empty(2, 2, device="meta")}), clients)
        updates = [LowRank(torch.tensor([[size], [0.0]]), torch.tensor([[1.0, 0.0]])) for size in (1.0, 1.0, 100.0)]
        replies = [
            Reply(client, rule.download(state, client, Round(1, 0)), {"w": update})
            for client, update in zip(clients, updates, strict=True)
        ]
        served[type(rule).__name__] = rule.served(rule.aggregate(state, replies, Round(1, 0)))["w"].dense()[0, 0].item()
    assert served["ClippedFlexLoRA"] == pytest.approx(1.0)
    assert served["FlexLoRA"] == pytest.approx(34.0)
