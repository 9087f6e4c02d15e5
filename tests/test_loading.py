"""A base model or an adapter that is not what was asked for is refused before a score or a step is made of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedllm.cli import main
from fedllm.errors import FedError
from fedllm.lowrank import LowRank
from fedllm.models import language
from fedllm.models.language import LanguageModel
from fedllm.models.loading_checks import check_names
from fedllm.models.peft_adapter import with_adapter
from fedllm.storage import peft_folder

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The model ``pico`` as a user's folder."""
    folder = tmp_path_factory.mktemp("models") / "right"
    language.load(LanguageModel("pico"), CPU, 0).save_pretrained(folder)
    language.tokenizer(LanguageModel("pico")).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def load(folder: Path) -> torch.nn.Module:
    return language.load(LanguageModel(str(folder)), CPU, 0)


def changed(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS, {"format": "pt"})


def test_a_folder_that_was_saved_is_loaded(saved: Path):
    whole, again = language.load(LanguageModel("pico"), CPU, 0), load(saved)
    assert all(torch.equal(weight, again.get_parameter(name)) for name, weight in whole.named_parameters())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_names_with_a_wrapper_s_prefix_are_named(copied: Path, prefix: str):
    changed(copied, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    with pytest.raises(FedError, match=rf"weights of the model are not in its files.*begin with '{prefix}'"):
        load(copied)


def test_one_missing_weight_is_an_error(copied: Path):
    name = "model.layers.1.mlp.up_proj.weight"
    changed(copied, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(FedError, match=rf"1 weights of the model are not in its files \({name}\)"):
        load(copied)


def test_one_tensor_too_many_is_an_error(copied: Path):
    changed(copied, lambda tensors: tensors | {"model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)})
    with pytest.raises(FedError, match=r"1 tensors of its files are no weights of the model \(model.layers.9"):
        load(copied)


def test_another_shape_is_an_error(copied: Path):
    name = "model.layers.0.mlp.up_proj.weight"
    changed(copied, lambda tensors: tensors | {name: tensors[name][:-1].clone()})
    with pytest.raises(
        FedError, match=r"1 have another shape .model.layers.0.mlp.up_proj.weight: \(\d+, \d+\) instead of"
    ):
        load(copied)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_finite_number_is_an_error(copied: Path, value: float):
    def spoil(tensors):
        tensors["model.norm.weight"][3] = value
        return tensors

    changed(copied, spoil)
    with pytest.raises(FedError, match="model.norm.weight has entries that are no finite numbers"):
        load(copied)


def test_old_libraries_buffers_are_no_error():
    check_names({"unexpected_keys": ["model.layers.0.self_attn.rotary_emb.inv_freq"]}, "old")
    with pytest.raises(FedError, match="h.0.mlp.bias"):
        check_names({"unexpected_keys": ["h.0.mlp.bias"]}, "old")


def test_a_cut_file_and_a_pointer_are_told_apart(copied: Path):
    whole = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FedError, match="model"):
        load(copied)
    (copied / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(FedError, match="pointer of Git LFS.*git lfs pull"):
        load(copied)
    (copied / WEIGHTS).write_bytes(b"")
    with pytest.raises(FedError, match="is empty"):
        load(copied)


def test_an_encoder_decoder_is_refused_before_its_weights_are_read(copied: Path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": config["vocab_size"]}))
    with pytest.raises(FedError, match="t5 is no causal language model"):
        language.skeleton(LanguageModel(str(copied)))


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(copied: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(copied)
    rows = json.loads((copied / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<new{n}>" for n in range(rows - len(tokenizer) + 1)])
    tokenizer.save_pretrained(copied)
    with pytest.raises(FedError, match=rf"ids up to {rows}, and the model embeds {rows} tokens"):
        language.tokenizer(LanguageModel(str(copied)))


def test_a_tokenizer_without_an_end_is_refused(copied: Path):
    file = copied / "tokenizer_config.json"
    page = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in page.items() if key not in ("eos_token", "pad_token")}))
    (copied / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(FedError, match="no end-of-sequence token"):
        language.tokenizer(LanguageModel(str(copied)))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    g = torch.Generator().manual_seed(3)
    base = language.skeleton(LanguageModel("pico"))
    updates = {}
    for name, weight in base.named_parameters():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            rows, columns = weight.shape
            factors = LowRank(torch.randn(rows, 2, generator=g), torch.randn(2, columns, generator=g))
            updates[name.removesuffix(".weight")] = factors
    peft_folder.write(tmp_path / "adapter", updates, base_model="pico", targets=("q_proj", "v_proj"))
    return tmp_path / "adapter"


def renamed(folder: Path, change) -> None:
    file = folder / peft_folder.WEIGHTS
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def served(folder: Path) -> torch.nn.Module:
    return with_adapter(language.load(LanguageModel("pico"), CPU, 0), folder, "pico")


def test_a_name_with_the_adapter_s_own_is_read_by_both(adapter: Path):
    plain, read = served(adapter).state_dict(), peft_folder.read(adapter).updates
    renamed(adapter, lambda name: name.replace(".weight", ".default.weight"))
    again = peft_folder.read(adapter).updates
    assert all(torch.equal(read[name].B, again[name].B) and torch.equal(read[name].A, again[name].A) for name in read)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in served(adapter).state_dict().items())


def test_names_without_peft_s_prefix_are_refused_by_both(adapter: Path):
    renamed(adapter, lambda name: name.removeprefix("base_model.model."))
    with pytest.raises(FedError, match="PEFT's names begin with 'base_model.model.'"):
        peft_folder.read(adapter)
    with pytest.raises(FedError, match="Half an adapter is none. PEFT's names begin"):
        served(adapter)


def test_half_an_adapter_is_none(adapter: Path):
    file = adapter / peft_folder.WEIGHTS
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "layers.0" in name}, file, {"format": "pt"})
    with pytest.raises(FedError, match="4 factors that its adapter_config.json asks for are not in it"):
        served(adapter)
    elsewhere = {name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}
    save_file(elsewhere, file, {"format": "pt"})
    with pytest.raises(FedError, match=r"4 of its 8 tensors fit no module of the model .*layers.7"):
        served(adapter)


def test_two_adapters_in_one_file_are_refused(adapter: Path):
    renamed(adapter, lambda name: name.replace(".weight", ".one.weight" if "layers.0" in name else ".two.weight"))
    with pytest.raises(FedError, match=r"several adapters \(one, two\)"):
        peft_folder.read(adapter)


def test_an_adapter_one_folder_deeper_is_read(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    outer = tmp_path / "outer"
    outer.mkdir()
    shutil.copytree(adapter, outer / "client_3")
    assert set(peft_folder.read(outer).updates) == set(peft_folder.read(adapter).updates)
    quick = ["task=word_problems", "data.test_rows=4", "generate=false", "resamples=50", "threads=1"]
    assert main(["evaluate", str(outer), *quick, f"output={tmp_path / 'one'}"]) == 0
    assert main(["evaluate", str(adapter), *quick, f"output={tmp_path / 'two'}"]) == 0
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert one["metrics"] == two["metrics"]
    shutil.copytree(adapter, outer / "client_4")
    capsys.readouterr()
    assert main(["evaluate", f"adapter={outer}", "model=pico", *quick, f"output={tmp_path / 'three'}"]) == 2
    assert "holds several adapters: client_3, client_4" in capsys.readouterr().err


def test_a_target_and_another_of_its_kind_are_refused(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The second would win, and its score would be taken for the first one's."""
    argv = ["evaluate", str(saved), "model=pico", "task=word_problems", f"output={tmp_path / 'out'}"]
    assert main(argv) == 2
    assert "model=pico names another" in capsys.readouterr().err
