"""Adapter folders as first-class things: modules that some lack, extra tensors, tokenizer, record, push."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedllm.cli import main
from fedllm.commands.aggregate import aggregate
from fedllm.errors import FedError
from fedllm.export.hub import of_rank
from fedllm.models.language import LanguageModel, tokenizer
from fedllm.storage import peft_folder
from fedllm.storage.peft_folder import CONFIG, WEIGHTS

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape)).eval()


def folder(path: Path, base: LlamaForCausalLM, seed: int, targets: tuple[str, ...], **config: Any) -> Path:
    model = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(r=2, lora_alpha=2, target_modules=list(targets), task_type="CAUSAL_LM", **config),
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    model.save_pretrained(str(path))
    return path


@pytest.fixture
def sites(tmp_path: Path, base: LlamaForCausalLM) -> list[Path]:
    """One that trains q and v, and one that trains q alone."""
    both = folder(tmp_path / "both", base, 1, ("q_proj", "v_proj"))
    return [both, folder(tmp_path / "one", base, 2, ("q_proj",))]


def dense(path: Path, name: str) -> torch.Tensor:
    return peft_folder.read(path).updates[name].dense()


def test_zero_counts_a_missing_module_as_no_update(sites: list[Path], tmp_path: Path) -> None:
    """3 rows and 1: v is 3/4 V + 1/4 0, q is 3/4 Q_1 + 1/4 Q_2."""
    done = aggregate("flexlora", sites, tmp_path / "out", samples=[3, 1], missing="zero")
    torch.testing.assert_close(done.update[V].dense(), 0.75 * dense(sites[0], V), rtol=1e-4, atol=1e-5)
    wanted = 0.75 * dense(sites[0], Q) + 0.25 * dense(sites[1], Q)
    torch.testing.assert_close(done.update[Q].dense(), wanted, rtol=1e-4, atol=1e-5)


def test_skip_averages_over_those_who_have_it(sites: list[Path], tmp_path: Path) -> None:
    done = aggregate("flexlora", sites, tmp_path / "out", samples=[3, 1], missing="skip")
    torch.testing.assert_close(done.update[V].dense(), dense(sites[0], V), rtol=1e-4, atol=1e-5)
    wanted = 0.75 * dense(sites[0], Q) + 0.25 * dense(sites[1], Q)
    torch.testing.assert_close(done.update[Q].dense(), wanted, rtol=1e-4, atol=1e-5)
    assert any(f"1 modules were aggregated over {sites[0]} alone" in remark for remark in done.remarks)


def test_without_either_the_remedy_is_named(sites: list[Path], tmp_path: Path, capsys: Any) -> None:
    assert main(["aggregate", "flexlora", *map(str, sites), "--out", str(tmp_path / "out")]) == 2
    assert "--missing zero counts it as no update" in capsys.readouterr().err


@pytest.mark.parametrize("config", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_tensors_beside_the_factors_are_averaged_dropped_or_refused(
    config: dict[str, Any], base: LlamaForCausalLM, tmp_path: Path
) -> None:
    if "bias" in config:  # a model whose linear layers have biases
        base = LlamaForCausalLM(LlamaConfig(**(base.config.to_dict() | {"attention_bias": True}))).eval()
    paths = [folder(tmp_path / str(i), base, i, ("q_proj",), **config) for i in range(2)]
    out = tmp_path / "out"
    with pytest.raises(FedError, match="--extras average or drop"):
        aggregate("fedit", paths, out)
    dropped = aggregate("fedit", paths, tmp_path / "dropped", extras="drop")
    assert "were dropped" in " ".join(dropped.remarks) and not peft_folder.read(tmp_path / "dropped").extras
    aggregate("fedit", paths, out, samples=[3, 1], extras="average")
    first, second = (load_file(path / WEIGHTS) for path in paths)
    extra = [name for name in first if ".lora_" not in name]
    assert extra
    for name, value in load_file(out / WEIGHTS).items():
        if name in extra:
            torch.testing.assert_close(value, 0.75 * first[name] + 0.25 * second[name])
    served = PeftModel.from_pretrained(copy.deepcopy(base), str(out))  # plain PEFT finds each of them
    state = {
        name.replace(".default", "").replace(".modules_to_save", ""): value
        for name, value in served.state_dict().items()
    }
    for name in extra:
        where = name if name in state else name.replace(".bias", ".base_layer.bias")
        torch.testing.assert_close(state[where], 0.75 * first[name] + 0.25 * second[name])


def test_tokenizer_record_and_card(sites: list[Path], tmp_path: Path, capsys: Any) -> None:
    bytes_of = tokenizer(LanguageModel(name="pico"))
    for site in sites:
        bytes_of.save_pretrained(site)
        (site / "chat_template.jinja").write_text("{{ messages }}")
    out = tmp_path / "out"
    line = ["aggregate", "flexlora", *map(str, sites), "--out", str(out), "--samples", "3,1", "--missing", "zero"]
    assert main([*line, "--rank", "1"]) == 0
    said = capsys.readouterr().out
    assert "Rank 1 keeps " in said and "% of the update's norm" in said
    assert AutoTokenizer.from_pretrained(out)("ab")["input_ids"] == bytes_of("ab")["input_ids"]
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    record = json.loads((out / "aggregate.json").read_text())
    assert [(c["folder"], c["samples"], c["share"]) for c in record["clients"]] == [("both", 3, 0.75), ("one", 1, 0.25)]
    assert "| both | 2 | 3 | 0.7500 |" in (out / "README.md").read_text()
    (sites[1] / "chat_template.jinja").write_text("another")
    assert main([*line, "--overwrite"]) == 0
    assert "chat_template.jinja are not the same in all folders" in capsys.readouterr().out
    assert not (out / "tokenizer.json").exists(), "half a tokenizer would be another one"


def test_a_rule_that_does_not_use_rows_says_so(base: LlamaForCausalLM, tmp_path: Path) -> None:
    paths = [folder(tmp_path / str(i), base, i, ("q_proj",)) for i in range(2)]
    told = aggregate("fedhl", paths, tmp_path / "fedhl", samples=[3, 1]).remarks
    assert "fedhl does not use --samples" in " ".join(told)
    told = aggregate("fedhl", paths, tmp_path / "avg", samples=[3, 1], options={"weights": "fedavg"}).remarks
    assert not told and not aggregate("flexlora", paths, tmp_path / "flex", samples=[3, 1]).remarks


def test_any_adapter_folder_can_be_pushed(sites: list[Path], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    aggregate("flexlora", sites, out, missing="skip")
    assert main(["push", str(out), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in (CONFIG, WEIGHTS, "README.md", "aggregate.json", "would be uploaded"))
    assert main(["push", str(sites[0]), "--dry-run"]) == 0  # PEFT's own
    assert main(["push", str(out), "--dry-run", "--merged"]) == 2
    assert "`fedllm merge` merges" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["push", str(tmp_path / "empty"), "--dry-run"]) == 2


def test_a_run_s_adapter_has_its_tokenizer_and_its_rank_is_told(tmp_path: Path, capsys: Any) -> None:
    line = ["train", "smoke", "run.threads=1", "clients.count=2", "clients.rank=[4,2]"]
    line += ["eval.base=false", "eval.generate=false", "algorithm.name=flora", "run.rounds=2"]
    assert main([*line, f"run.output={tmp_path / 'run'}"]) == 0
    assert "the clients' at most 4: hub.rank=4 exports" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")("ab")["input_ids"]


def test_an_export_of_a_rank_is_the_best_approximation(base: LlamaForCausalLM, tmp_path: Path) -> None:
    W = peft_folder.read(folder(tmp_path / "a", base, 1, ("q_proj",))).updates[Q]
    U, S, Vt = torch.linalg.svd(W.dense())
    for update in (W, W.dense()):
        cut = of_rank({Q: update, "shared/x": torch.ones(3)}, 1)
        torch.testing.assert_close(cut[Q].dense(), S[0] * torch.outer(U[:, 0], Vt[0]), rtol=1e-4, atol=1e-5)
        assert torch.equal(cut["shared/x"], torch.ones(3))
    assert of_rank({Q: W}, None)[Q] is W
