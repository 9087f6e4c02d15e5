"""Recipes: every page loads, a typo is answered with the nearest key, and what is written back is the same run."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest

from fedllm.algorithms import ALGORITHMS
from fedllm.config.rank_profiles import PROFILES
from fedllm.config.schema import parse_section
from fedllm.data.partition import PARTITIONS
from fedllm.errors import FedError
from fedllm.evaluation.settings import SCORED, Settings
from fedllm.fleets.faults import Faults
from fedllm.recipe import sections
from fedllm.recipe.page import dump, find, folders, load
from fedllm.recipe.sections import Clients
from fedllm.server.robust import ROBUST
from fedllm.tasks import TASKS
from fedllm.workers import WORKERS

PAGES = sorted({page.stem for folder in folders() for page in folder.glob("*.yaml")})


@pytest.mark.parametrize("name", PAGES)
def test_every_page_loads_and_starts_with_its_command(name):
    recipe = load([f"recipe={name}"])
    assert recipe.name == name and recipe.run.rounds >= 1
    first = find(name).read_text().splitlines()[0]
    assert first == f"# accelerate launch fedllm/train.py recipe={name}"


@pytest.mark.parametrize("name", PAGES)
def test_what_is_dumped_loads_to_the_same_recipe(name, tmp_path):
    recipe = load([f"recipe={name}", "run.seed=5"])
    (tmp_path / f"{name}.yaml").write_text(dump(recipe))
    again = load([f"recipe={tmp_path / name}.yaml"])
    assert again == recipe


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("run.ronds=3", r"run\.ronds is not a key.*Did you mean run\.rounds"),
        ("algoritm.name=fedhl", r"algoritm is not a key.*Did you mean algorithm"),
        ("algorithm.name=fedhll", r"no algorithm of that name.*Did you mean fedhl"),
        ("algorithm.epsilom=1", r"algorithm\.epsilom.*Did you mean algorithm\.epsilon"),
        ("algorithm.epsilon=small", r"algorithm\.epsilon='small': give a finite number above 0"),
        ("algorithm.weights=fedav", r"algorithm\.weights='fedav': give 'fedhl', 'fedavg' or 'rank'\."),
        ("run.rounds=many", r"run\.rounds='many': give a whole number from 1 up\."),
        ("run.rounds=0", r"run\.rounds=0: give a whole number from 1 up\."),
        ("run.rounds=2.5", r"run\.rounds=2\.5"),
        ("run=3", r"run=3: this is a section"),
        ("data.name=gsm9k", r"no data of that name.*Did you mean gsm8k"),
        ("data.partition.name=dirichlets", r"Did you mean dirichlet"),
        ("data.partition.eta=0.1", r"data\.partition\.eta is not a key"),
        ("clients.rank=hihg", r"Did you mean high"),
        ("clients.rank=[4,0]", r"from 1 up"),
        ("clients.participation=1.5", r"clients\.participation=1\.5: give a number above 0, up to 1"),
        ("clients.count=7", r"cannot share 4 ranks evenly"),
        ("worker.learning_rat=1", r"Did you mean worker\.learning_rate"),
        ("worker.batch_size=0", r"^worker\.batch_size=0: give a whole number from 1 up"),
        ("model.quantization=3bit", r"model\.quantization='3bit'.*4bit"),
        ("eval.every=-1", r"eval\.every=-1"),
        ("nonsense", r"'nonsense' is not understood"),
        ("recipe=demo", r"recipe=smoke and recipe=demo: a run has one recipe"),
        ("algorithm.name=fedlh", r"Did you mean fedhl\?"),
        ("algorithm=null", r"algorithm='null': this is a section"),
        ("run=", r"run='': this is a section"),
        ("run.rounds=???", r"give one"),
        ("run.rounds=[1", r"'run\.rounds=\[1' is not understood"),
        ("data.prompt_template=Q: {question} A:", r"'data\.prompt_template=.*is not understood.*quotes"),
        ("clients.rank={a: 1}", r"'clients\.rank=\{a: 1\}' does not fit"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_remedy(argument, message):
    with pytest.raises(FedError, match=message) as caught:
        load(["recipe=smoke", "run.rounds=1", argument])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("algorithm.temperature=0", r"algorithm\.temperature=0: give a finite number above 0, or null\."),
        ("algorithm.temperature=-1", r"algorithm\.temperature=-1"),
        ("algorithm.temperature=nan", r"algorithm\.temperature='nan'"),
        ("algorithm.epsilon=.inf", r"algorithm\.epsilon=inf: give a finite number above 0\."),
        ("algorithm={name: fedlmt, rho: -1}", r"algorithm\.rho=-1: give a whole number from 0 up, or null\."),
        ("algorithm={name: fedhm, alphas: {b1: 0}}", r"algorithm\.alphas\.b1=0: give a finite number above 0\."),
        ("algorithm={name: fedhm, svd_every: 0}", r"algorithm\.svd_every=0: give a whole number from 1 up, or null\."),
        ("algorithm={name: fedkd, energy: 2}", r"algorithm\.energy=2"),
        ("algorithm={name: fml, a: -0.1}", r"algorithm\.a=-0\.1"),
        ("algorithm={name: depthfl, temperature: 0}", r"algorithm\.temperature=0"),
        ("algorithm={name: progfed, stages: 0}", r"algorithm\.stages=0"),
        ("algorithm={name: fedrep, head_share: 1.1}", r"algorithm\.head_share=1\.1"),
        ("algorithm={name: pfedlora1, rank: 0}", r"algorithm\.rank=0"),
        ("algorithm={name: mfedloru, a: -1}", r"algorithm\.a=-1"),
        ("algorithm={name: fedloru, tau: 0}", r"algorithm\.tau=0: give a whole number from 1 up\."),
        ("algorithm={name: fedlora, mu: 1.5}", r"algorithm\.mu=1\.5: give a number from 0 to 1\."),
        ("algorithm={name: fedlora, hidden: 0}", r"algorithm\.hidden=0"),
        ("algorithm={name: fd, groups: 1}", r"algorithm\.groups=1: give a whole number from 2 up"),
        ("algorithm={name: fedproto, coefficient: -1}", r"algorithm\.coefficient=-1"),
        ("algorithm={name: flanc, orthogonality: -1}", r"algorithm\.orthogonality=-1"),
        ("robust={name: clip, bound: 0}", r"robust\.bound=0"),
        ("robust={name: krum, keep: 0}", r"robust\.keep=0"),
        ("robust={name: krum, liars: -1}", r"robust\.liars=-1"),
        ("robust={name: trimmed_mean, share: 0.5}", r"robust\.share=0\.5: .*below 0\.5, for it is cut off at both"),
        ("worker.learning_rate=-1", r"^worker\.learning_rate=-1: give a finite number from 0 up\."),
        ("worker.learning_rate=nan", r"worker\.learning_rate='nan'"),
        ("worker.learning_rate=inf", r"worker\.learning_rate='inf'"),
        ("worker.alpha=0", r"worker\.alpha=0: give a number above 0, or a multiple of the rank such as 2r\."),
        ("worker.alpha=-3", r"worker\.alpha=-3"),
        ("worker.alpha=0r", r"^worker\.alpha='0r': give"),
        ("worker.alpha=true", r"worker\.alpha=True"),
        ("worker.weight_decay=-1", r"worker\.weight_decay=-1"),
        ("worker.max_grad_norm=-1", r"worker\.max_grad_norm=-1"),
        ("worker.dropout=2", r"worker\.dropout=2: give a number from 0 to below 1\."),
        ("worker.epochs=nan", r"worker\.epochs='nan'"),
        ("worker.epochs=inf", r"worker\.epochs='inf': give a finite number above 0\."),
        ("worker.steps=-1", r"^worker\.steps=-1: give a whole number from 1 up, or null\."),
        ("worker.targets=q_proj", r"worker\.targets='q_proj': give a list, \[q_proj\]\."),
        ("worker={name: vision, momentum: -1}", r"worker\.momentum=-1"),
        ("worker={name: vision, final_learning_rate: -1}", r"worker\.final_learning_rate=-1"),
        ("eval.max_new_tokens=0", r"eval\.max_new_tokens=0"),
        ("eval.batch_size=0", r"eval\.batch_size=0"),
        ("run.seed=-1", r"run\.seed=-1: give a whole number from 0 to 4294967295\."),
        ("run.seed=100000000000000000000000", r"run\.seed=1"),
        ("run.threads=-2", r"run\.threads=-2"),
        ("run.rounds=true", r"run\.rounds=True"),
        ("run.resume=maybe", r"run\.resume='maybe': give true or false\."),
        ("clients.rank=true", r"clients\.rank=True: give a rank from 1 up, a list of them, or a profile's name\."),
        ("clients.count=0", r"clients\.count=0"),
        ("clients.count=-4", r"clients\.count=-4"),
        ("faults.delay=-1", r"faults\.delay=-1"),
        ("faults.drop=nan", r"faults\.drop='nan'"),
        ("data.held_out=-1", r"data\.held_out=-1"),
        ("data.train_rows=-3", r"data\.train_rows=-3"),
        ("data.stop=['']", r"^data\.stop: an empty text"),
        ("data.partition={name: dirichlet, eta: 0}", r"data\.partition\.eta=0"),
        ("data.partition={name: dirichlet, minimum: -1}", r"data\.partition\.minimum=-1"),
        ("data={name: wikitext2, words: 2}", r"data\.words=2: give a whole number from 3 up\."),
        ("data={name: wikitext2, rate: 1}", r"data\.rate=1: give a number between 0 and 1\."),
        ("data={name: prototypes, sigma: -1}", r"data\.sigma=-1"),
        ("data={name: codealpaca, wall_seconds: 0}", r"data\.wall_seconds=0"),
    ],
)
def test_a_number_out_of_its_range_is_one_sentence_with_the_range(argument, message):
    with pytest.raises(FedError, match=message) as caught:
        load(["recipe=smoke", argument])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "argument",
    [
        "algorithm.temperature=null", "worker.learning_rate=0", "worker.epochs=0.5", "worker.max_grad_norm=0",
        "worker.alpha=16", "worker.alpha=0.5r", "run.quorum=1", "run.seed=4294967295", "clients.participation=1",
        "eval.every=0", "data.train_rows=1e2", "faults={drop: 0.5, straggle: 0.5}", "faults.factor=-1",
        "algorithm={name: mfedloru, a: 0}", "robust={name: trimmed_mean, share: 0}", "algorithm.epsilon=1",
    ],
)  # fmt: skip
def test_the_ends_of_a_range_and_numbers_in_other_spellings_are_taken(argument):
    load(["recipe=smoke", argument])


KINDS = dict.fromkeys(
    [
        *(sections.Run, sections.Clients, sections.Data, sections.Evaluation, sections.Admission, Faults, Settings),
        *(kind for table in (ALGORITHMS, WORKERS, ROBUST, PARTITIONS, TASKS, SCORED) for kind in table.values()),
        *(worker.model_section for worker in WORKERS.values()),
    ]
)
"""Every dataclass whose fields a user can set."""

NEEDED = {sections.Data: {"task": None}}
"""What has no default."""


def leaves(hint):
    """The types that a hint is made of, without Annotated's words and a mapping's keys."""
    parts = get_args(hint)[1:] if get_origin(hint) in {dict, Mapping} else get_args(hint)
    return {hint} if not parts else set().union(*map(leaves, parts))


def numbers(kind):
    """Name and hint of each field that can hold a number."""
    hints = get_type_hints(kind)
    named = [(f.name, hints[f.name]) for f in dataclasses.fields(kind) if f.init]
    return [(name, hint) for name, hint in named if leaves(hint) & {int, float}]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_number_of_any_table_may_be_nan_infinite_or_a_truth_value(kind):
    for name, hint in numbers(kind):
        for wrong in (math.nan, math.inf, -math.inf, True):
            held = {"b1": wrong} if get_origin(hint) in {dict, Mapping} else wrong
            with pytest.raises(FedError, match=rf"^x\.{name}(\.b1)?={wrong}: give "):
                parse_section(kind, NEEDED.get(kind, {}) | {name: held}, "x")


def test_what_has_no_default_is_asked_for():
    with pytest.raises(FedError, match=r"^data=\{'path': 'x'\}: give task too"):
        parse_section(sections.Data, {"path": "x"}, "data")


def test_the_law_sees_numbers():
    assert [name for name, _ in numbers(ALGORITHMS["fedhl"])] == ["epsilon", "temperature"]
    assert {"alphas", "alpha", "decay"} < {name for name, _ in numbers(ALGORITHMS["fedhm"])}
    assert {"rank", "count"} < {name for name, _ in numbers(Clients)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smokey", r"no recipe of that name.*Did you mean smoke"),
        ("missing.yaml", r"there is no such file"),
        ("tests", r"a path that ends in \.yaml"),
    ],
)
def test_a_recipe_that_is_not_there(name, message, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(FedError, match=f"(?i){message}"):
        load([f"recipe={name}"])


def test_a_section_that_an_override_replaces_whole_is_not_one_value():
    """Whatever other key of it is given too: `fedllm plan` itself adds `run.plan=true`."""
    with pytest.raises(FedError, match="run=3: this is a section"):
        load(["recipe=smoke", "run=3", "run.plan=true"])


def test_another_model_leaves_the_page_s_architecture_behind():
    """fedhl_gsm8k plans Llama-2-7B from the config in its page; what another model is must come from that model."""
    assert load(["recipe=fedhl_gsm8k"]).model.config == {"model_type": "llama"}
    assert load(["recipe=fedhl_gsm8k", "model.name=gpt2"]).model.config == {}
    assert load(["recipe=fedhl_gsm8k", "model.name=x/y", "model.config={a: 1}"]).model.config == {"a": 1}
    assert load(["recipe=fedhl_gsm8k", "model.name=gpt2"]).model.dtype == "bfloat16"


def test_no_recipe_lists_the_recipes():
    with pytest.raises(FedError, match="which recipe.*smoke"):
        load([])


def test_a_page_that_is_not_yaml(tmp_path):
    (tmp_path / "bad.yaml").write_text("run: [1, 2\nalgorithm: {")
    with pytest.raises(FedError, match=r"bad.yaml.*line 2"):
        load([f"recipe={tmp_path / 'bad.yaml'}"])
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(FedError, match="sections"):
        load([f"recipe={tmp_path / 'list.yaml'}"])


def test_ranks_of_profiles_lists_and_numbers():
    assert Clients(rank="high").ranks() == [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]
    hundred = Clients(rank="moderate", count=100).ranks()
    assert sum(hundred) / 100 == 16 and hundred[:10] == [32] * 10  # the paper: ten times each, mean rank 16
    assert all(len(profile) == 10 for profile in PROFILES.values())
    assert Clients(rank=4, count=3).ranks() == [4, 4, 4]
    assert Clients(rank=(8, 2), count=4).ranks() == [8, 8, 2, 2]


def test_a_corpus_made_to_order_has_as_many_rows_as_asked():
    recipe = load(["recipe=smoke", "data.train_rows=3000", "data.test_rows=300"])
    assert len(recipe.data.task.load(None, "train")) == 3000
    assert len(recipe.data.task.load(None, "test")) == 300


def test_another_rule_leaves_the_page_s_keys_of_its_own_behind():
    recipe = load(
        ["recipe=fedhl_gsm8k", "algorithm.name=flora", "data.name=word_problems", "data.partition.name=by_rank"]
    )
    assert recipe.algorithm_name == "flora" and recipe.data_name == "word_problems"
    kept = load(["recipe=fedhl_gsm8k", "algorithm.name=fedhl", "algorithm.temperature=2"]).algorithm
    assert (kept.epsilon, kept.temperature) == (1e-6, 2.0)
    with pytest.raises(FedError, match="algorithm.epsilon is not a key"):
        load(["recipe=fedhl_gsm8k", "algorithm.name=flora", "algorithm.epsilon=1"])


@pytest.mark.parametrize(("asked", "places"), [("null", []), ("2", [2]), ("[0,3]", [0, 3]), ("all", [0, 1, 2, 3])])
def test_which_clients_also_train_alone(asked, places):
    assert load(["recipe=smoke", f"eval.alone={asked}"]).eval.alone_of(4) == places


@pytest.mark.parametrize("asked", ["4", "[0,-1]", "some"])
def test_a_client_that_is_not_there_cannot_train_alone(asked):
    with pytest.raises(FedError, match="eval.alone="):
        load(["recipe=smoke", f"eval.alone={asked}"])
