"""Recipes: every page loads, a typo is answered with the nearest key, and what is written back is the same run."""

from pathlib import Path

import pytest

from fedllm.core import FedError
from fedllm.recipe import PROFILES, Clients, dump, find, folders, load

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
        ("algorithm.epsilon=small", r"algorithm\.epsilon='small'.*float"),
        ("algorithm.weights=fedav", r"algorithm\.weights='fedav'.*fedavg"),
        ("run.rounds=many", r"run\.rounds='many'.*int"),
        ("run.rounds=0", r"at least 1 round"),
        ("run.rounds=2.5", r"run\.rounds=2\.5"),
        ("run=3", r"run=3: this is a section"),
        ("data.name=gsm9k", r"no data of that name.*Did you mean gsm8k"),
        ("data.partition.name=dirichlets", r"Did you mean dirichlet"),
        ("data.partition.eta=0.1", r"data\.partition\.eta is not a key"),
        ("clients.rank=hihg", r"Did you mean high"),
        ("clients.rank=[4,0]", r"from 1 up"),
        ("clients.participation=1.5", r"not in \(0, 1\]"),
        ("clients.count=7", r"cannot share 4 ranks evenly"),
        ("worker.learning_rat=1", r"Did you mean worker\.learning_rate"),
        ("worker.batch_size=0", r"batch_size=0: at least 1"),
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
