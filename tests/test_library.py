"""The way in from Python: what its page shows is run, and importing the package stays light."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import fedllm
import fedllm.core
from fedllm.algorithms import ALGORITHMS
from fedllm.errors import FedError

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def test_a_rule_and_a_model_of_ones_own_run_two_rounds() -> None:
    names: dict = {"__name__": "page"}
    sys.modules["page"] = type(sys)("page")
    exec(compile(blocks()[1], "docs/python.md", "exec"), names)
    table = names["done"].rounds
    assert list(table["round"]) == [1, 1, 1, 2, 2, 2] and set(table["client"]) == {"site-0", "site-1", "site-2"}
    assert table["train_loss"].notna().all()


def test_a_run_of_the_page_gives_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(blocks()[0], "docs/python.md", "exec"), names)
    result = names["result"]
    assert list(result.rounds.index) == [1] and len(result.clients) == 4
    assert result.clients["weight"].sum() == pytest.approx(1)
    assert (result.adapter / "adapter_model.safetensors").is_file()
    assert "federated" in result._repr_html_() and result.plot()


def test_simulating_fedavg_is_the_mean_of_the_local_steps() -> None:
    """One round, weights 1/4 and 3/4: 1 and 5 become 4."""

    def step(model: nn.Module, client: fedllm.core.Client, rnd: fedllm.core.Round) -> dict[str, float]:
        nn.init.constant_(model.weight, {"a": 1.0, "b": 5.0}[client.id])
        return {"train_loss": 0.0}

    model = nn.Linear(1, 1, bias=False)
    before = model.weight.clone()
    done = fedllm.simulate(ALGORITHMS["fedavg"](), {"a": 1, "b": 3}, step, 1, model=model)
    assert done.model.weight.item() == pytest.approx(4.0) and torch.equal(model.weight, before)


def test_a_rule_on_low_rank_updates_is_refused_in_a_sentence() -> None:
    with pytest.raises(FedError, match="low-rank update"):
        fedllm.simulate(ALGORITHMS["fedit"](), {"a": 1}, lambda model, client, rnd: {}, 1, model=nn.Linear(2, 2))


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, fedllm; print(sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)))"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", time.perf_counter() - started
