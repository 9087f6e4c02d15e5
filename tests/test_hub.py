"""Export and push: the merged model, the card, and a push to a fake Hub on loopback that plain PEFT then loads from."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fake_hub
import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedllm.errors import FedError
from fedllm.export import hub, merge
from fedllm.export import model_card as card
from fedllm.lowrank import LowRank
from fedllm.models import language
from fedllm.models.language import LanguageModel
from fedllm.recipe.page import load
from fedllm.recipe.sections import Hub
from fedllm.reports import run_record as story
from fedllm.storage import peft_folder as adapters

ROOT = Path(__file__).parents[1]
QUICK = ["run.threads=1", "worker.steps=4", "data.train_rows=24", "data.test_rows=4", "eval.max_new_tokens=4"]
TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz0123456789"

LOADS = """
import json, sys, torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from fedllm.models.inference import held_out_loss
from fedllm.models.language import load as load_base
from fedllm.recipe import load
from fedllm.federation.text import TextFederation

page, repo, whole, out = sys.argv[1:]
federation = TextFederation(load([f"recipe={page}"]))
recipe = federation.recipe
rows, pad = federation.scored, federation.tokenizer.pad_token_id
base = lambda: load_base(recipe.model, torch.device("cpu"), recipe.run.seed)
models = {
    "adapter": PeftModel.from_pretrained(base(), repo).eval(),
    "beside": PeftModel.from_pretrained(base(), whole, subfolder="adapter").eval(),
    "client": PeftModel.from_pretrained(base(), whole, subfolder="clients/c1").eval(),
    "merged": AutoModelForCausalLM.from_pretrained(whole).eval(),
}
ids = AutoTokenizer.from_pretrained(whole)("Question: 1 + 1?", return_tensors="pt")["input_ids"]
with torch.no_grad():
    torch.save({name: model(input_ids=ids).logits for name, model in models.items()} | {"ids": ids}, out)
print(json.dumps({name: held_out_loss(model, rows, pad, recipe.eval.batch_size) for name, model in models.items()}))
"""


def environment(url: str = "", home: Path | None = None, token: str | None = TOKEN) -> dict[str, str]:
    """Of a process that has a Hub: what conftest set for the tests' own process is taken back."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "OFFLINE" not in name}
    # the Xet protocol needs a storage server of its own: files go through git LFS, as on a self-hosted Hub
    kept |= {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    kept |= {"HF_ENDPOINT": url} if url else {"HF_HUB_OFFLINE": "1"}
    kept |= {"HF_HOME": str(home)} if home else {}
    return kept | ({"HF_TOKEN": token} if token else {})


def fedllm(*arguments: object, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fedllm.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two rounds of the smoke recipe that keep every client's adapter, and a dry run of the push at the end."""
    cwd = tmp_path_factory.mktemp("hub")
    arguments = ["hub.clients=true", "hub.push=true", "hub.dry_run=true", "hub.repo=me/smoke", "run.output=run"]
    done = fedllm("train", "recipe=smoke", *QUICK, *arguments, cwd=cwd, env=environment(home=cwd / "home"))
    assert done.returncode == 0, done.stderr
    assert "would be uploaded to me/smoke (private)" in done.stdout and "adapter_model.safetensors" in done.stdout
    return cwd / "run"


@pytest.fixture
def server():
    with fake_hub.running(TOKEN) as running:
        yield running


def text_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size < 1 << 20]


def test_a_push_end_to_end(run, server, tmp_path):
    """Pushed past two failing answers; plain PEFT and transformers then load the run's own model from there."""
    env = environment(server.url, tmp_path / "home")
    server.failures = [503, 0]
    first = fedllm("push", run, "--repo", "me/smoke", cwd=tmp_path, env=env)
    assert first.returncode == 0, first.stderr
    assert not server.failures and f"{server.url}/me/smoke" in first.stdout.replace("\n", "")
    second = fedllm("push", run, "--repo", "me/whole", "--merged", "--clients", cwd=tmp_path, env=env)
    assert second.returncode == 0, second.stderr
    pushed, whole = server.repos["me/smoke"], server.repos["me/whole"]
    assert pushed.private and whole.private and pushed.commits == whole.commits == 1
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "recipe.yaml", "rounds.jsonl"} <= set(
        pushed.files
    )
    assert "clients/c3/adapter_model.safetensors" in whole.files and "model.safetensors" in whole.files
    assert pushed.files["adapter_model.safetensors"] == (run / "adapter/adapter_model.safetensors").read_bytes()

    command = [sys.executable, "-c", LOADS, run / "recipe.yaml", "me/smoke", "me/whole", tmp_path / "logits.pt"]
    loaded = subprocess.run(list(map(str, command)), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert loaded.returncode == 0, loaded.stderr
    losses = json.loads(loaded.stdout.splitlines()[-1])
    scores = json.loads((run / "rounds.jsonl").read_text().splitlines()[-1])["eval"]
    for name in ("adapter", "beside", "merged"):
        assert losses[name] == pytest.approx(scores["loss"], rel=1e-5), name
    assert losses["client"] != pytest.approx(scores["loss"], rel=1e-5)
    logits = torch.load(tmp_path / "logits.pt")
    expected = by_hand(run / "adapter", logits.pop("ids"))
    for name in ("adapter", "beside", "merged"):
        torch.testing.assert_close(logits[name], expected, rtol=1e-4, atol=1e-5)

    for told in (first, second, loaded):
        assert TOKEN not in told.stdout + told.stderr
    assert not any(TOKEN in path.read_text(errors="replace") for path in text_files(run))
    assert not any(TOKEN.encode() in content for repo in server.repos.values() for content in repo.files.values())
    here = str(run.parents[1]).encode()
    assert not any(here in content for repo in server.repos.values() for content in repo.files.values())


def by_hand(adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    """The logits of W + B A, summed into the weights here, with neither PEFT nor merge.py."""
    base = language.load(LanguageModel("pico"), torch.device("cpu"), 0)
    modules = dict(base.named_modules())
    for name, update in adapters.read(adapter).updates.items():
        modules[name].weight.data += update.B @ update.A
    with torch.no_grad():
        return base(input_ids=ids).logits


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (["--repo", "me/x"], None, "there is no Hugging Face token"),
        (["--repo", "me/x"], "hf_" + "wrong" * 8, "does not accept the token"),
        (["--repo", "notmine/x"], TOKEN, "may not write to notmine/x"),
        (["--repo", "x"], TOKEN, "give OWNER/NAME"),
        (["--repo", "me/public"], TOKEN, "exists and is public"),
        (["--repo", "me/x", "--license", TOKEN], TOKEN, "README.md holds a Hugging Face token"),
    ],
)
def test_a_push_that_cannot_be_uploads_nothing_and_says_why(run, server, tmp_path, arguments, token, message):
    server.repos["me/public"] = fake_hub.Repo(private=False)
    done = fedllm("push", run, *arguments, cwd=tmp_path, env=environment(server.url, tmp_path / "home", token))
    assert done.returncode == 2 and message in done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not any(repo.files for repo in server.repos.values())
    assert not token or token not in done.stderr + done.stdout


def test_no_repo_no_run_no_way_and_no_adapter(run, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("adapter", "adapter_clients", "checkpoint"))
    page = yaml.safe_load((bare / "recipe.yaml").read_text())
    page["hub"] |= {"push": False, "repo": None, "clients": False}
    (bare / "recipe.yaml").write_text(yaml.safe_dump(page))
    cases = [
        (lambda: hub.push_run(bare), "where to?"),
        (lambda: hub.push_run(run), "the Hub cannot be reached"),
        (lambda: hub.push_run(tmp_path), "no run's folder"),
        (lambda: hub.push_run(bare, dry_run=True), "the run is not finished"),
        (lambda: load(["recipe=smoke", "hub.push=true"]), "hub.push=true needs hub.repo"),
    ]
    for asked, message in cases:
        with pytest.raises(FedError, match=message.replace("?", r"\?")):
            asked()


def test_an_upload_that_fails_at_the_end_of_a_run_says_how_to_try_again(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    recipe = load([f"recipe={run / 'recipe.yaml'}", f"run.output={tmp_path / 'run'}", "hub.dry_run=false"])
    with pytest.raises(FedError, match="cannot be reached.*The run itself is whole: `fedllm push .*run` uploads it"):
        hub.publish(recipe, Console())
    hub.publish(load(["recipe=smoke"]), Console())


def test_a_run_ends_in_the_merged_model_where_that_is_asked_for(run, tmp_path):
    """Without a Hub and a push: plain transformers loads it, and it is the base plus the run's adapter."""
    shutil.copytree(run, tmp_path / "run")
    asked = [f"run.output={tmp_path / 'run'}", "hub.push=false", "hub.merged=true"]
    recipe = load([f"recipe={run / 'recipe.yaml'}", *asked])
    hub.ready(recipe)
    hub.publish(recipe, Console())
    base = language.load(recipe.model, torch.device("cpu"), recipe.run.seed)
    served = PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/merged").eval()
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, served(input_ids=ids).logits, rtol=0, atol=1e-4)
    with pytest.raises(FedError, match="trains no adapter"):
        hub.ready(load(["recipe=vision_smoke", "hub.merged=true"]))


def test_a_run_that_could_not_be_uploaded_does_not_begin(tmp_path):
    dead = environment("http://127.0.0.1:9", tmp_path / "home")
    arguments = ["recipe=smoke", "hub.push=true", "hub.repo=me/x", "run.output=new"]
    done = fedllm("train", *arguments, cwd=tmp_path, env=dead)
    assert done.returncode == 2 and "cannot be reached" in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_dry_run_needs_neither_token_nor_hub_and_lists_what_a_push_uploads(run, server, tmp_path):
    dry = fedllm(
        "push", run, "--repo", "me/y", "--dry-run", cwd=tmp_path, env=environment(home=tmp_path / "a", token=None)
    )
    assert dry.returncode == 0, dry.stderr
    assert not server.requests
    done = fedllm("push", run, "--repo", "me/y", "--public", cwd=tmp_path, env=environment(server.url, tmp_path / "b"))
    assert done.returncode == 0, done.stderr
    listed = {line.split()[0] for line in dry.stdout.splitlines()[:-1]}
    assert listed == set(server.repos["me/y"].files) and not server.repos["me/y"].private
    assert not any(name.startswith("eval/") for name in listed), "generations hold test rows: they stay here"


def test_a_run_without_an_adapter_is_told_before_it_trains():
    with pytest.raises(FedError, match="worker.name=vision trains no adapter"):
        hub.ready(load(["recipe=vision_smoke", "hub.push=true", "hub.repo=me/x", "hub.dry_run=true"]))
    hub.ready(load(["recipe=vision_smoke"]))


def test_waits_double_and_end():
    from huggingface_hub.errors import HTTPError

    waited, calls = [], []

    def never():
        calls.append(1)
        raise HTTPError("nobody there")

    with pytest.raises(FedError, match="did not answer in 5 tries"):
        hub.attempt(never, "me/x", wait=waited.append)
    assert waited == [1, 2, 4, 8] and len(calls) == 5


def random_adapter(folder: Path, scale: float, model: LanguageModel, target: str = "q_proj") -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {n: m.weight.shape for n, m in language.skeleton(model).named_modules() if n.endswith(target)}
    updates = {
        name: LowRank(scale * torch.randn(out, 3, generator=generator), torch.randn(3, inp, generator=generator))
        for name, (out, inp) in shapes.items()
    }
    adapters.write(folder, updates, base_model=model.name, targets=[target])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_folder_is_base_plus_adapter(tmp_path, dtype):
    model = LanguageModel("pico")
    random_adapter(tmp_path / "adapter", 0.05, model)
    found = merge.merge(model, tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    assert found.dtype == dtype and found.modules == 2
    assert found.merge_error < 1e-6 and found.logits_error < 1e-4 < found.effect
    # bfloat16 keeps 8 bits of a weight: the update and the base are about as large here
    assert (found.cast_error < 1e-6) == (dtype == "float32") and found.cast_error < 0.02
    ids = torch.randint(259, (1, 20), generator=torch.Generator().manual_seed(0))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert next(saved.parameters()).dtype == getattr(torch, dtype)
    with torch.no_grad():
        got = saved.float()(input_ids=ids).logits
    expected = by_hand(tmp_path / "adapter", ids)
    worst = float((got - expected).abs().max())
    assert worst < (1e-4 if dtype == "float32" else 0.3 * found.effect)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]
    assert str(tmp_path) not in (tmp_path / "merged/config.json").read_text()


def test_a_small_update_is_lost_to_bfloat16_and_the_report_says_so(tmp_path):
    """An update of 1/1000 of the weights' size: half a step of bfloat16 is 1/512 of a weight, so most of it goes."""
    model = LanguageModel("pico")
    random_adapter(tmp_path / "adapter", 1e-5, model)
    found = merge.merge(model, tmp_path / "adapter", tmp_path / "merged", dtype="bfloat16")
    assert found.merge_error < 1e-3 and found.cast_error > 0.5


def test_a_merge_that_is_not_the_served_model_is_not_kept(tmp_path, monkeypatch):
    model = LanguageModel("pico")
    random_adapter(tmp_path / "adapter", 0.05, model)
    honest = merge.save

    def damaging(model, tokenizer, folder):
        honest(model, tokenizer, folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.self_attn.q_proj.weight"] *= 1.05
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merge, "save", damaging)
    with pytest.raises(FedError, match="is not the one that was trained"):
        merge.merge(model, tmp_path / "adapter", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_weight_that_two_layers_share_is_not_merged(tmp_path):
    random_adapter(tmp_path / "adapter", 0.05, LanguageModel("pico"), target="lm_head")
    base = language.load(LanguageModel("pico"), torch.device("cpu"), 0)
    base.lm_head.weight = base.model.embed_tokens.weight
    with pytest.raises(FedError, match="shares its weight with the input embedding"):
        merge.add(base, adapters.read(tmp_path / "adapter").updates, torch.float32)


def test_the_merge_of_transposed_layers(tmp_path):
    """GPT-2's layers hold their weights as (d_in, d_out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=32)).eval()
    update = {"transformer.h.0.attn.c_attn": LowRank(0.1 * torch.randn(48, 2), torch.randn(2, 16))}
    adapters.write(tmp_path / "adapter", update, base_model=None, targets=["c_attn"])
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": True}))
    ids = [torch.arange(10)[None]]
    whole = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    expected = merge.logits(whole, ids)
    base = whole.unload()
    before = merge.logits(base, ids)
    merge.add(base, update, torch.float32)
    assert merge.difference(before, expected) > 0.01
    assert merge.difference(merge.logits(base, ids), expected) < 1e-5


def test_the_card_tells_the_run(run):
    told = story.read(run)
    page = card.text(run, told, licence="apache-2.0", known=card.versions(), plots=["data"], repo="me/smoke")
    _, head, body = page.split("---\n", 2)
    data = yaml.safe_load(head)
    assert data["license"] == "apache-2.0" and data["library_name"] == "peft" and "fedhl" in data["tags"]
    assert "base_model" not in data, "pico is no model of the Hub"
    scores = {m["type"]: m["value"] for r in data["model-index"][0]["results"] for m in r["metrics"]}
    assert scores == json.loads((run / "rounds.jsonl").read_text().splitlines()[-1])["eval"]
    for words in (
        "**fedhl**",
        "Ranks: 16, 8, 4, 2",
        "plots/data.png",
        "95 % interval",
        "me/smoke",
        "learning_rate",
        "torch",
    ):
        assert words in body, words
    assert "down" in body and "whose" not in head


@pytest.mark.parametrize("dropped", ["summary.json", "partition.json", "eval", "plots", "versions.json"])
def test_a_card_is_written_of_what_there_is(run, tmp_path, dropped):
    shutil.copytree(run, tmp_path / "run")
    gone = tmp_path / "run" / dropped
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    parcel = hub.pack(tmp_path / "run", Hub(repo="me/x"), None)
    assert (
        parcel["README.md"].startswith(b"---\n")
        and b"licence of the base model could not be read" in parcel["README.md"]
    )


def test_paths_of_this_machine_are_not_shared(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    page = yaml.safe_load((run / "recipe.yaml").read_text())
    page["data"]["path"] = "/srv/ann/clinic/rows.jsonl"
    page["run"]["output"] = "~/runs/x"
    (tmp_path / "run/recipe.yaml").write_text(yaml.safe_dump(page))
    config = tmp_path / "run/adapter/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "/srv/ann/llama"}))
    parcel = hub.pack(tmp_path / "run", Hub(repo="me/x"), None)
    texts = [v for v in parcel.values() if isinstance(v, bytes)]
    assert not any(b"ann" in text for text in texts)
    assert json.loads(parcel["adapter_config.json"])["base_model_name_or_path"] == "llama"
    assert yaml.safe_load(parcel["recipe.yaml"])["data"]["path"] == "rows.jsonl"


def test_the_licence_is_read_from_the_card_beside_the_weights(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "base").mkdir()
    (tmp_path / "base/README.md").write_text("---\nlicense: llama2\n---\n# Base\n")
    page = yaml.safe_load((run / "recipe.yaml").read_text())
    page["model"]["name"] = str(tmp_path / "base")
    (tmp_path / "run/recipe.yaml").write_text(yaml.safe_dump(page))
    assert hub.known_licence(tmp_path / "run") == "llama2"
    assert hub.known_licence(run) is None


def test_the_interval_by_hand():
    """Wilson, n = 100, share 0.5: 0.5 +- 1.96 / 1.0384 * sqrt(0.25 / 100 + 1.96^2 / 40000) = 0.5 +- 0.0962."""
    low, high = card.interval([0.0, 1.0] * 50)
    assert low == pytest.approx(0.4038, abs=1e-4) and high == pytest.approx(0.5962, abs=1e-4)
    assert card.interval([1.0, 1.0, 1.0]) == (pytest.approx(3 / (3 + 1.96**2), abs=1e-4), 1.0)


def test_each_client_s_own_adapter_is_kept_when_asked_for(run):
    ranks = {place.name: adapters.read(place).rank for place in sorted((run / "adapter_clients").iterdir())}
    assert ranks == {"c0": 16, "c1": 8, "c2": 4, "c3": 2}
    assert load([f"recipe={run / 'recipe.yaml'}"]).hub.clients


def planted(folder: Path, where: str) -> None:
    """A file of the run's folder becomes a link out of it, or something that the run did not write."""
    secret = folder.parent / "secret"
    secret.write_text("mine")
    file = folder / where
    file.unlink()
    file.symlink_to(secret)


@pytest.mark.parametrize(
    "where", ["rounds.jsonl", "plots/learning.png", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"]
)
def test_no_link_is_followed_out_of_a_run(where: str, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    planted(tmp_path / "run", where)
    with pytest.raises(FedError, match="is a link"):
        hub.pack(tmp_path / "run", Hub(repo="me/x"), None)


def test_a_file_that_no_run_writes_is_not_sent(run: Path, tmp_path: Path) -> None:
    """A further picture stays here; a picture that is none, and weights that are none, are refused."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/plots/evil.png").write_bytes(b"anything")
    assert not any("evil" in name for name in hub.pack(tmp_path / "run", Hub(repo="me/x"), None))
    (tmp_path / "run/plots/learning.png").write_bytes(b"anything")
    with pytest.raises(FedError, match="no PNG picture"):
        hub.pack(tmp_path / "run", Hub(repo="me/x"), None)
    shutil.copy(run / "plots/learning.png", tmp_path / "run/plots")
    (tmp_path / "run/adapter/adapter_model.safetensors").write_bytes(b"anything")
    with pytest.raises(FedError, match="damaged|no whole|not a whole"):
        hub.pack(tmp_path / "run", Hub(repo="me/x"), None)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("hf_" + "a" * 20, "Hugging Face"),
        ("sk-proj-" + "a1B2" * 8, "OpenAI"),
        ("AKIA" + "ABCD" * 4, "AWS"),
        ("ghp_" + "a1B2" * 9, "GitHub"),
        ("github_pat_" + "a1B2" * 9, "GitHub"),
        ("xoxb-123456789012-abcdef", "Slack"),
        ("AIza" + "a1B2c" * 7, "Google"),
        ("WANDB_API_KEY=" + "0123456789abcdef01234567" + "0123456789abcdef", "Weights & Biases"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "private key"),
    ],
)
def test_a_key_in_the_diary_is_found_and_named_with_its_file(key: str, what: str) -> None:
    parcel = {"rounds.jsonl": json.dumps({"refused": {"c1": f"It ended in {key} and more."}}).encode()}
    with pytest.raises(FedError, match=rf"rounds.jsonl holds .*{what}.*nothing was uploaded"):
        hub._refuse_secrets(parcel)


def test_a_secret_of_the_environment_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_API_KEY", "plain-words-of-mine")
    with pytest.raises(FedError, match="README.md holds the value of MY_SERVICE_API_KEY"):
        hub._refuse_secrets({"README.md": b"see plain-words-of-mine"})
    hub._refuse_secrets({"README.md": b"an honest card with sha256 " + b"0123456789abcdef" * 4})


def test_paths_in_words_are_cut_too(run: Path, tmp_path: Path) -> None:
    """A client's exception in the diary and the run's title name folders."""
    shutil.copytree(run, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    lines[-1]["refused"] = {
        "c9": "No such file: /home" + "/alice/secret plans/x.py or C:\\Users\\bob\\y.py, /srv/ann/base/w"
    }
    (tmp_path / "run/rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = yaml.safe_load((run / "recipe.yaml").read_text())
    page["data"]["path"] = "/srv/ann/base"
    (tmp_path / "run/recipe.yaml").write_text(yaml.safe_dump(page))
    summary = json.loads((run / "summary.json").read_text()) | {"title": "run of /srv/ann/base, 4 clients"}
    (tmp_path / "run/summary.json").write_text(json.dumps(summary))
    parcel = hub.pack(tmp_path / "run", Hub(repo="me/x"), None)
    for name in ("rounds.jsonl", "README.md", "recipe.yaml"):
        assert not any(word in bytes(parcel[name]) for word in (b"alice", b"bob", b"/ann")), name
    for line in bytes(parcel["rounds.jsonl"]).decode().splitlines():
        json.loads(line)
