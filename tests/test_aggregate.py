"""``fedllm aggregate`` against dense float64 algebra that shares no code with it, on folders that PEFT wrote."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fedllm.algorithms import LOW_RANK
from fedllm.cli import main as cli
from fedllm.commands.aggregate import aggregate
from fedllm.errors import FedError
from fedllm.storage.peft_folder import CONFIG, WEIGHTS

Dense = dict[str, NDArray[np.float64]]
SAMPLES = [30, 10, 60]
MIXED: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 3},
    {"r": 4, "lora_alpha": 16, "use_rslora": True},
    {"r": 7, "lora_alpha": 7},
]
EQUAL: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 3},
    {"r": 4, "lora_alpha": 16, "use_rslora": True},
    {"r": 4, "lora_alpha": 7},
]


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    """A Llama of 2 layers and width 32, its keys and values half as wide."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **shape)).eval()


def folder(
    path: Path, base: LlamaForCausalLM, seed: int, targets: Sequence[str] = ("q_proj", "v_proj"), **config: Any
) -> Path:
    """An adapter of random factors, written by PEFT."""
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(target_modules=list(targets), task_type="CAUSAL_LM", **config)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    model.save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, base: LlamaForCausalLM) -> dict[str, list[Path]]:
    """Three clients of mixed rank, three of one rank, and two adapters of the round before: of rank 4 and of rank 9."""
    root = tmp_path_factory.mktemp("clients")
    mixed = [folder(root / f"mixed{i}", base, i, **config) for i, config in enumerate(MIXED)]
    equal = [folder(root / f"equal{i}", base, 10 + i, **config) for i, config in enumerate(EQUAL)]
    before = folder(root / "before", base, 20, r=4, lora_alpha=2)
    wide = folder(root / "wide", base, 21, r=9, lora_alpha=18)
    return {"mixed": mixed, "equal": equal, "before": [before], "wide": [wide]}


# --- the algebra, once more, dense and in float64


def factors(path: Path) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """``(scale * B, A)`` by module, from the two files as they lie there; one rank and alpha a folder."""
    config = json.loads((path / CONFIG).read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    tensors = {name: tensor.double().numpy() for name, tensor in load_file(path / WEIGHTS).items()}
    names = sorted({name.split(".lora_")[0] for name in tensors})
    return {
        name.removeprefix("base_model.model."): (
            scale * tensors[f"{name}.lora_B.weight"],
            tensors[f"{name}.lora_A.weight"],
        )
        for name in names
    }


def best(W: NDArray[np.float64], r: int) -> NDArray[np.float64]:
    U, S, Vt = np.linalg.svd(W)
    return (U[:, :r] * S[:r]) @ Vt[:r]


def shares(samples: Sequence[float]) -> NDArray[np.float64]:
    return np.array(samples) / sum(samples)


def by_factors(paths: Sequence[Path], samples: Sequence[float]) -> Dense:
    """FedIT and zero-padding: factors are padded to the largest rank and averaged."""
    clients, p = [factors(path) for path in paths], shares(samples)
    out = {}
    for name in clients[0]:
        r = max(client[name][0].shape[1] for client in clients)
        pairs = [client[name] for client in clients]
        B = sum(w * np.pad(B, ((0, 0), (0, r - B.shape[1]))) for w, (B, _) in zip(p, pairs, strict=True))
        A = sum(w * np.pad(A, ((0, r - A.shape[0]), (0, 0))) for w, (_, A) in zip(p, pairs, strict=True))
        out[name] = B @ A
    return out


def by_products(paths: Sequence[Path], samples: Sequence[int], before: Path | None = None) -> Dense:
    """FlexLoRA (nothing before) and FLoRA (on top of the sum so far)."""
    clients, p = [factors(path) for path in paths], shares(samples)
    start = {name: B @ A for name, (B, A) in factors(before).items()} if before else {}
    return {
        name: start.get(name, 0.0)
        + sum(w * client[name][0] @ client[name][1] for w, client in zip(p, clients, strict=True))
        for name in clients[0]
    }


def norms(paths: Sequence[Path]) -> list[float]:
    """``|M_i|_F`` over the whole model, which HetLoRA weighs by."""
    return [float(np.sqrt(sum(np.linalg.norm(B @ A) ** 2 for B, A in factors(path).values()))) for path in paths]


def held(clients: Sequence[Any], name: str, samples: Sequence[int]) -> NDArray[np.float64]:
    """Column j of client i has share ``n_i`` over the sum of those that have a column j: (clients, columns)."""
    has = np.arange(99)[None] < np.array([[client[name][0].shape[1]] for client in clients])
    counts = has * np.array(samples, float)[:, None]
    return counts / np.maximum(counts.sum(0), 1e-300)


def by_columns(paths: Sequence[Path], samples: Sequence[int]) -> Dense:
    """RBLA."""
    clients, out = [factors(path) for path in paths], {}
    for name, (B, A) in clients[0].items():
        r = max(client[name][0].shape[1] for client in clients)
        meanB, meanA = np.zeros((len(B), r)), np.zeros((r, A.shape[1]))
        for client, p in zip(clients, held(clients, name, samples), strict=True):
            for j in range(client[name][0].shape[1]):
                meanB[:, j] += p[j] * client[name][0][:, j]
                meanA[j] += p[j] * client[name][1][j]
        out[name] = meanB @ meanA
    return out


def by_directions(paths: Sequence[Path], samples: Sequence[int]) -> Dense:
    """The sum that raFLoRA serves."""
    clients, out = [factors(path) for path in paths], {}
    for name in clients[0]:
        pairs = zip(clients, held(clients, name, samples), strict=True)
        out[name] = sum(
            p[j] * np.outer(client[name][0][:, j], client[name][1][j])
            for client, p in pairs
            for j in range(client[name][0].shape[1])
        )
    return out


def fedhl(paths: Sequence[Path], before: Path | None, epsilon: float = 1e-6, temperature: float | None = 1.0) -> Dense:
    """Equations 8 and 15 and the smoothing of section VI.A, one weight a client for the whole model."""
    clients = [factors(path) for path in paths]
    ranks = [next(iter(client.values()))[0].shape[1] for client in clients]
    W = {name: B @ A for name, (B, A) in (factors(before) if before else clients[0]).items()}
    W = W if before else {name: 0 * w for name, w in W.items()}
    e2 = np.array([sum(np.linalg.norm(w - best(w, r)) ** 2 for w in W.values()) for r in ranks])
    p = 1 / (e2 + epsilon)
    p = p / p.sum()
    if temperature is not None:
        p = np.exp(p / temperature) / np.exp(p / temperature).sum()
    return {
        name: sum(
            w_i * (W[name] + client[name][0] @ client[name][1] - best(W[name], r))
            for w_i, client, r in zip(p, clients, ranks, strict=True)
        )
        for name in W
    }


# --- what plain PEFT makes of the folder


def loaded(path: Path, base: LlamaForCausalLM, recwarn: pytest.WarningsRecorder) -> PeftModel:
    """The folder in plain PEFT, which must have nothing to warn about."""
    recwarn.clear()
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(path))
    assert [str(w.message) for w in recwarn if "adapter" in str(w.message) or "PEFT" in str(w.message)] == []
    return model.eval()


def agrees(path: Path, wanted: Dense, base: LlamaForCausalLM, recwarn: pytest.WarningsRecorder) -> None:
    """Every module's update to 1e-5 relative, and the logits those of the base model with the updates added."""
    model = loaded(path, base, recwarn)
    given = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert given.keys() == wanted.keys()
    for name, matrix in wanted.items():
        assert np.linalg.norm(given[name] - matrix) <= 1e-5 * np.linalg.norm(matrix), name
    dense = copy.deepcopy(base)
    with torch.no_grad():
        for name, matrix in wanted.items():
            dense.get_submodule(name).weight += torch.from_numpy(matrix).float()
        tokens = torch.arange(24).view(2, 12)
        logits = dense(tokens).logits
        torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(base(tokens).logits, logits, rtol=1e-4, atol=1e-4), "the update must show"


CASES: dict[str, list[tuple[str, list[str], str | None, Any]]] = {
    "fedit": [("equal", [], None, by_factors), ("equal", [], "before", by_factors)],
    "zero_padding": [("mixed", [], None, by_factors), ("mixed", [], "wide", by_factors)],
    "flexlora": [("mixed", [], None, by_products), ("mixed", [], "wide", by_products)],
    "flora": [("mixed", [], None, by_products), ("mixed", [], "wide", lambda p, n, g: by_products(p, n, g))],
    "fedalt": [("equal", [], None, lambda p, n: by_factors(p, [1] * len(p)))],  # all alike, whatever they hold
    **{rule: [("equal", [], None, by_factors)] for rule in ("feddpa", "fedlora_avg", "fedloru", "pfedloru")},
    "fedhl": [
        ("mixed", [], None, lambda p, n: fedhl(p, None)),
        ("mixed", [], "wide", lambda p, n, g: fedhl(p, g)),
        ("mixed", ["--temperature", "none"], "wide", lambda p, n, g: fedhl(p, g, temperature=None)),
        ("mixed", ["--temperature", "0.1", "--epsilon", "0.5"], "wide", lambda p, n, g: fedhl(p, g, 0.5, 0.1)),
        ("equal", ["--temperature", "null"], "wide", lambda p, n, g: fedhl(p, g, temperature=None)),
    ],
    **{rule: [("equal", [], None, by_products)] for rule in ("fedex_lora", "fedmomentum")},
    "florist": [("mixed", ["--set", "threshold=1.0"], None, by_products)],
    "lora_fair": [("equal", ["--set", "steps=0"], None, by_factors)],
    "fedrot_lora": [("equal", [], None, by_factors)],  # nothing turns where nothing was sent
    "hetlora": [("mixed", [], None, lambda p, n: by_factors(p, norms(p)))],
    "rbla": [("mixed", [], None, by_columns)],
    "fed_plora": [("equal", [], None, by_columns)],
    "raflora": [("mixed", [], None, by_directions)],
}


def test_no_rule_is_left_out() -> None:
    assert LOW_RANK.keys() - CASES.keys() == PARTS.keys(), "see the next test"


PARTS = {
    "mfedloru": "MFedLoRU",
    "ffa_lora": "FFALoRA",
    "rolora": "RoLoRA",
    "fedsvd": "FedSVD",
    "fedsa_lora": "FedSALoRA",
    "fed_sb": "FedSB",
}
"""Rules whose clients return a part of an adapter, or factors of one."""


@pytest.mark.parametrize(("rule", "name"), PARTS.items())
def test_a_rule_whose_clients_return_no_adapters_says_so(
    rule: str, name: str, folders: dict[str, list[Path]], tmp_path: Path
) -> None:
    with pytest.raises(FedError, match=f"{name} return other things than adapters"):
        aggregate(rule, folders["equal"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rule", "case"), [(rule, case) for rule, cases in CASES.items() for case in range(len(cases))]
)
def test_equal_to_dense_float64_algebra(
    rule: str,
    case: int,
    folders: dict[str, list[Path]],
    base: LlamaForCausalLM,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kind, options, before, algebra = CASES[rule][case]
    paths, out = folders[kind], tmp_path / "out"
    argv = [rule, *map(str, paths), "--out", str(out), "--samples", ",".join(map(str, SAMPLES)), *options]
    extra: list[Any] = []
    if before:
        argv += ["--global", str(folders[before][0])]
        extra = [folders[before][0]] if rule in ("flora", "fedhl") else []
    assert cli(["aggregate", *argv]) == 0, capsys.readouterr().err
    wanted = algebra(paths, SAMPLES, *extra)
    agrees(out, wanted, base, recwarn)
    config = json.loads((out / CONFIG).read_text())
    assert config["lora_alpha"] == config["r"], "the scale is folded in"
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]


def test_samples_are_equal_by_default(
    folders: dict[str, list[Path]], base: LlamaForCausalLM, tmp_path: Path, recwarn: Any
) -> None:
    done = aggregate("flexlora", folders["mixed"], tmp_path / "out")
    assert list(done.shares.values()) == pytest.approx([1 / 3] * 3)
    agrees(tmp_path / "out", by_products(folders["mixed"], [1, 1, 1]), base, recwarn)


@pytest.mark.parametrize("rule", CASES)
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_a_rank_makes_it_the_best_approximation(
    rule: str, rank: int, folders: dict[str, list[Path]], base: LlamaForCausalLM, tmp_path: Path, recwarn: Any
) -> None:
    """16 is v_proj's own height, and more than what some rules return: the written rank is 16 all the same."""
    paths = folders["equal"]
    whole = {"fedhl": lambda: fedhl(paths, None), "fedit": lambda: by_factors(paths, SAMPLES)}
    whole |= dict.fromkeys(
        (
            "zero_padding",
            "fedlora_avg",
            "fedloru",
            "pfedloru",
            "rbla",
            "lora_fair",
            "fedrot_lora",
            "fed_plora",
            "feddpa",
        ),
        whole["fedit"],
    )
    whole["hetlora"] = lambda: by_factors(paths, norms(paths))
    whole["fedalt"] = lambda: by_factors(paths, [1] * len(paths))
    dense = whole.get(rule, lambda: by_products(paths, SAMPLES))()
    options: dict[str, Any] = {"florist": {"threshold": 1.0}, "lora_fair": {"steps": 0}}.get(rule, {})
    aggregate(rule, paths, tmp_path / "out", samples=SAMPLES, rank=rank, options=options)
    agrees(tmp_path / "out", {name: best(W, rank) for name, W in dense.items()}, base, recwarn)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["r"], config["rank_pattern"]) == (rank, {})


@pytest.mark.parametrize("rule", ["flexlora", "flora", "fedhl", "zero_padding"])
def test_ranks_that_differ_inside_a_folder(rule: str, base: LlamaForCausalLM, tmp_path: Path, recwarn: Any) -> None:
    """rank_pattern on the way in, against the same updates in folders of one rank (zeros added)."""
    a = folder(tmp_path / "a", base, 1, r=3, lora_alpha=5, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 4})
    b = folder(tmp_path / "b", base, 2, r=5, lora_alpha=5)
    done = aggregate(rule, [a, b], tmp_path / "out")
    assert [client.rank for client in done.clients] == [3, 5]
    model = loaded(tmp_path / "out", base, recwarn)
    parts = [loaded(path, base, recwarn) for path in (a, b)]
    name = "base_model.model.model.layers.1.self_attn.v_proj"
    first, second = (part.get_submodule(name).get_delta_weight("default").detach() for part in parts)
    given = model.get_submodule(name).get_delta_weight("default").detach()
    if rule == "zero_padding":
        pair = [part.get_submodule(name) for part in parts]
        B = (
            sum(
                torch.nn.functional.pad(m.lora_B["default"].weight * m.scaling["default"], (0, 5 - m.r["default"]))
                for m in pair
            )
            / 2
        )
        A = sum(torch.nn.functional.pad(m.lora_A["default"].weight, (0, 0, 0, 5 - m.r["default"])) for m in pair) / 2
        torch.testing.assert_close(given, (B @ A).detach(), rtol=1e-4, atol=1e-7)
    else:
        torch.testing.assert_close(given, (first + second) / 2, rtol=1e-4, atol=1e-7)


def test_fedhl_compares_each_module_with_what_its_own_rank_was_sent(base: LlamaForCausalLM, tmp_path: Path) -> None:
    """Client 1 has rank 3 in q and 1 in v, client 2 has rank 4: W^(r), its error and the increment are by module."""
    patterns = {"rank_pattern": {"v_proj": 1}, "alpha_pattern": {"v_proj": 1}}
    paths = [
        folder(tmp_path / "one", base, 1, r=3, lora_alpha=3, **patterns),
        folder(tmp_path / "two", base, 2, r=4, lora_alpha=4),
    ]
    before = folder(tmp_path / "before", base, 2, r=6, lora_alpha=18)
    done = aggregate("fedhl", paths, tmp_path / "out", global_=before, options={"temperature": None})
    W = {name: B @ A for name, (B, A) in factors(before).items()}
    ranks: list[dict[str, int]] = [{name: 1 if "v_proj" in name else 3 for name in W}, dict.fromkeys(W, 4)]
    e2 = np.array([sum(np.linalg.norm(W[name] - best(W[name], r[name])) ** 2 for name in W) for r in ranks])
    p = (1 / (e2 + 1e-6)) / (1 / (e2 + 1e-6)).sum()
    assert 0.05 < p[0] < 0.45, "the weights must depend on the ranks for this to mean anything"
    assert list(done.shares.values()) == pytest.approx(p, rel=1e-5)
    for name, update in done.update.items():
        wanted = W[name].copy()
        for path, share, r in zip(paths, p, ranks, strict=True):
            B, A = factors(path)[name]
            wanted += share * (B @ A - best(W[name], r[name]))
        assert np.linalg.norm(update.dense().double().numpy() - wanted) <= 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("rule", CASES)
def test_alpha_cancels(rule: str, base: LlamaForCausalLM, tmp_path: Path, folders: dict[str, list[Path]]) -> None:
    """Doubling alpha and halving B is the same adapter, to the bit: powers of two."""
    paths = folders["equal"]
    once = aggregate(rule, paths, tmp_path / "once", samples=SAMPLES)
    doubled = []
    for i, path in enumerate(paths):
        (tmp_path / f"{i}").mkdir()
        config = json.loads((path / CONFIG).read_text())
        (tmp_path / f"{i}" / CONFIG).write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
        tensors = {n: t / 2 if "lora_B" in n else t for n, t in load_file(path / WEIGHTS).items()}
        save_file(tensors, tmp_path / f"{i}" / WEIGHTS)
        doubled.append(tmp_path / f"{i}")
    twice = aggregate(rule, doubled, tmp_path / "twice", samples=SAMPLES)
    for name, update in once.update.items():
        assert torch.equal(update.B, twice.update[name].B) and torch.equal(update.A, twice.update[name].A)


@pytest.mark.parametrize("rule", CASES)
def test_its_own_output_can_be_the_round_before(rule: str, folders: dict[str, list[Path]], tmp_path: Path) -> None:
    aggregate(rule, folders["equal"], tmp_path / "one")
    aggregate(rule, folders["equal"], tmp_path / "two", global_=tmp_path / "one")
    assert (tmp_path / "two" / WEIGHTS).exists()


def test_the_same_folder_twice_is_itself(
    folders: dict[str, list[Path]], base: LlamaForCausalLM, tmp_path: Path, recwarn: Any
) -> None:
    one = folders["mixed"][1]
    done = aggregate("flexlora", [one, one], tmp_path / "out")
    assert [client.id for client in done.clients] == [str(one), f"{one} (2)"]
    agrees(tmp_path / "out", by_products([one], [1]), base, recwarn)


def test_the_summary_names_clients_and_shares(folders: dict[str, list[Path]], tmp_path: Path, capsys: Any) -> None:
    paths = folders["mixed"]
    argv = ["flexlora", *map(str, paths), "--out", str(tmp_path / "out"), "--samples", "30,10,60"]
    assert cli(["aggregate", *argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["client", "rank", "samples", "share"]
    assert [line.split()[1:] for line in lines[1:4]] == [
        ["2", "30", "0.3000"],
        ["4", "10", "0.1000"],
        ["7", "60", "0.6000"],
    ]
    assert lines[4] == f"flexlora: 4 modules of rank 13 written to {tmp_path / 'out'}"


# --- what ends in one sentence


def refused(capsys: pytest.CaptureFixture[str], argv: Sequence[str | Path]) -> str:
    """The one line on stderr of a command that ends with 2."""
    assert cli(["aggregate", *(str(part) for part in argv)]) == 2
    given = capsys.readouterr()
    assert given.out == "" and given.err.count("\n") == 1 and "Traceback" not in given.err
    return given.err


def test_commands_that_cannot_work(folders: dict[str, list[Path]], tmp_path: Path, capsys: Any) -> None:
    mixed, out = folders["mixed"], tmp_path / "out"
    to = ["--out", out]
    cases: list[tuple[list[Any], str]] = [
        (["fedlh", *mixed, *to], "Did you mean fedhl?"),
        (["xyzzy", *mixed, *to], "Valid: fed_plora, fed_sb, fedalt"),
        (["fedit", *mixed, *to], "[2, 4, 7]"),
        (["fedit", *folders["equal"], *to, "--global", folders["wide"][0]], "rank 9 does not fit into rank 4"),
        (["flexlora", *mixed, *to, "--epsilon", "0.1"], "flexlora has no option 'epsilon': it belongs to fedhl"),
        (["flora", *mixed, *to, "--temperature", "none"], "flora has no option 'temperature'"),
        (["fedhl", *mixed, *to, "--epsilon", "0"], "give a finite number above 0"),
        (["fedhl", *mixed, *to, "--epsilon", "nan"], "give a finite number above 0"),
        (["fedhl", *mixed, *to, "--temperature", "cold"], "fedhl.temperature='cold'"),
        (["flora", *mixed, *to, "--samples", "1,2"], "2 counts for 3 adapters"),
        (["flora", *mixed, *to, "--samples", "1,2,0"], "1 or more each, got 0"),
        (["flora", *mixed, *to, "--samples", "1,2,x"], "whole numbers"),
        (["flora", *mixed, *to, "--rank", "0"], "--rank must be from 1 to 32"),
        (["flora", *mixed, *to, "--rank", "1000000000"], "the largest side of a module, got 1000000000"),
        (["flora", *mixed, tmp_path / "nowhere", *to], "nowhere is not a folder"),
        (["flora", *mixed], "--out"),
        (["flora", *to], "DIR"),
        (["flora", *mixed, *to, "--global", tmp_path / "nowhere"], "nowhere is not a folder"),
        (["flora", *mixed, *to, "--sample", "1"], "--samples"),
    ]
    for argv, words in cases:
        assert words in refused(capsys, argv), argv
        assert list(tmp_path.iterdir()) == []


def test_the_command_line_passes_it_on(folders: dict[str, list[Path]], tmp_path: Path, capsys: Any) -> None:
    argv = ["aggregate", "fedlh", *map(str, folders["mixed"]), "--out", str(tmp_path / "out")]
    assert cli(argv) == 2 and "Did you mean fedhl?" in capsys.readouterr().err
    assert cli(["aggregate", "fedhl", *argv[2:]]) == 0 and (tmp_path / "out" / WEIGHTS).exists()


def test_adapters_that_do_not_fit_each_other(
    folders: dict[str, list[Path]], base: LlamaForCausalLM, tmp_path: Path, capsys: Any
) -> None:
    first = folders["mixed"][0]
    more = folder(tmp_path / "more", base, 0, targets=["q_proj", "k_proj", "v_proj"], r=2)
    less = folder(tmp_path / "less", base, 0, targets=["v_proj"], r=2)
    wider = LlamaForCausalLM(LlamaConfig(**(base.config.to_dict() | {"num_key_value_heads": 4})))
    other = folder(tmp_path / "other", wider, 0, r=2)
    out = tmp_path / "out"
    line = refused(capsys, ["flora", first, more, "--out", out])
    assert f"{more} has model.layers.0.self_attn.k_proj, and {first} has not" in line
    line = refused(capsys, ["flora", first, first, "--global", less, "--out", out])
    assert f"{first} has model.layers.0.self_attn.q_proj, and {less} has not" in line
    line = refused(capsys, ["flora", first, other, "--out", out])
    assert f"model.layers.0.self_attn.v_proj is (16, 32) in {first} and (32, 32) in {other}" in line
    assert not out.exists()


def test_an_adapter_too_large_to_average_is_named(folders: dict[str, list[Path]], tmp_path: Path, capsys: Any) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / CONFIG).write_bytes((folders["mixed"][0] / CONFIG).read_bytes())
    save_file({n: t * 1e22 for n, t in load_file(folders["mixed"][0] / WEIGHTS).items()}, bad / WEIGHTS)
    line = refused(capsys, ["flora", folders["mixed"][1], bad, "--out", tmp_path / "out"])
    assert str(bad) in line and "so large" in line
    for rule in ("flora", "fedhl"):  # 1e22 squared is no float32: it would be taken for a zero
        line = refused(capsys, [rule, folders["mixed"][1], "--global", bad, "--out", tmp_path / "out"])
        assert f"--global {bad}" in line and "so large" in line


def test_a_folder_that_is_taken_is_kept(folders: dict[str, list[Path]], tmp_path: Path, capsys: Any) -> None:
    mixed, out = list(map(str, folders["mixed"])), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "not empty" in refused(capsys, ["flora", *mixed, "--out", out])
    assert "notes.txt" in refused(capsys, ["flora", *mixed, "--out", out, "--overwrite"])
    (out / "notes.txt").unlink()
    assert cli(["aggregate", "flora", *mixed, "--out", str(out)]) == 0
    first = (out / WEIGHTS).read_bytes()
    assert cli(["aggregate", "zero_padding", *mixed, "--out", str(out), "--overwrite"]) == 0
    assert (out / WEIGHTS).read_bytes() != first


def test_options_of_a_rule_by_name(folders: dict[str, list[Path]], tmp_path: Path) -> None:
    """Every constant of a rule's dataclass can be given to the function: Table VIII's weights, r_i / sum r."""
    done = aggregate("fedhl", folders["mixed"], tmp_path / "out", options={"weights": "rank"})
    assert list(done.shares.values()) == pytest.approx([2 / 13, 4 / 13, 7 / 13])
    with pytest.raises(FedError, match="no rule has it"):
        aggregate("fedhl", folders["mixed"], tmp_path / "other", options={"nonsense": 1})
