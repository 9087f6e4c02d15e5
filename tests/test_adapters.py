"""PEFT folders: what is read is what PEFT would add to the weights, and nothing else gets in."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedllm.errors import FedError
from fedllm.lowrank import LowRank
from fedllm.storage.peft_folder import CONFIG, WEIGHTS, read, write

Q0, Q1, V0 = "layers.0.q", "layers.1.q", "layers.0.v"
SHAPES = {Q0: (6, 8), Q1: (6, 8), V0: (4, 8)}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 6, bias=False)
        self.v = nn.Linear(8, 4, bias=False)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer.q(x) for layer in self.layers] + [layer.v(x) for layer in self.layers], dim=-1)


def peft_folder(path: Path, seed: int = 0, **config: Any) -> None:
    """A folder that PEFT itself wrote, with random A and B. PEFT sorts the patterns when it saves them."""
    model = get_peft_model(Net(), LoraConfig(target_modules=["q", "v"], **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    model.save_pretrained(str(path))


def deltas(model: PeftModel) -> dict[str, Tensor]:
    """What PEFT adds to each weight."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def plain(path: Path, seed: int = 0, rank: int = 2, **changes: Any) -> Path:
    """A small valid folder, written by hand; ``changes`` go into its config."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (d_out, d_in) in SHAPES.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator)
    path.mkdir(parents=True)
    save_file(tensors, path / WEIGHTS)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q", "v"], **changes}
    (path / CONFIG).write_text(json.dumps(config))
    return path


def retensor(folder: Path, **changes: Tensor | None) -> Path:
    """Tensors replaced, added or (``None``) taken out; ``q0_A`` is short for layers.0.q's lora_A."""
    tensors = load_file(folder / WEIGHTS)
    for key, tensor in changes.items():
        name = f"base_model.model.layers.0.q.lora_{key[-1]}.weight" if key.startswith("q0_") else key
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / WEIGHTS)
    return folder


def raw(folder: Path, header: Mapping[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file from its parts, honest or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return folder


# --- reading


@pytest.mark.parametrize(
    "config",
    [
        {"r": 2, "lora_alpha": 5},
        {"r": 4, "lora_alpha": 3, "use_rslora": True},
        {"r": 2, "lora_alpha": 5, "rank_pattern": {"q": 3}, "alpha_pattern": {"layers.1.q": 7}},
        {"r": 2, "lora_alpha": 5, "rank_pattern": {"layers.0.q": 3, r"layers\.[01]\.q": 1}, "use_rslora": True},
        {"r": 2, "lora_alpha": 5, "alpha_pattern": {"^layers.0.q": 9, "v": 1}},
        {"r": 2, "lora_alpha": 8, "exclude_modules": ["layers.0.q"], "init_lora_weights": "gaussian"},
    ],
    ids=["plain", "rslora", "patterns", "first pattern wins", "anchors", "not every q"],
)
def test_what_is_read_is_what_peft_adds(tmp_path: Path, config: dict[str, Any]) -> None:
    peft_folder(tmp_path / "a", **config)
    adapter = read(tmp_path / "a")
    wanted = deltas(PeftModel.from_pretrained(Net(), str(tmp_path / "a")))
    assert adapter.updates.keys() == wanted.keys()
    for name, update in adapter.updates.items():
        torch.testing.assert_close(update.dense(), wanted[name], rtol=1e-5, atol=1e-6)
    assert adapter.rank == config["r"]
    assert adapter.targets == (None if "exclude_modules" in config else ("q", "v"))


@settings(max_examples=100, deadline=None)
@given(
    patterns=st.lists(
        st.sampled_from(
            ["q", "v", "0.q", "layers.0.q", "^layers.0.q", "s.0.q", r"layers\.\d.v", ".*q", "layers", "(q|v)", ""]
        ),
        unique=True,
    ),
    module=st.sampled_from([Q0, Q1, V0, "q", "x.layers.0.q"]),
)
def test_patterns_match_as_in_peft(patterns: list[str], module: str) -> None:
    from fedllm.storage import peft_folder as adapters

    values = dict(zip(patterns, range(1, 99), strict=False))
    table = adapters._table(Path("config"), {"rank_pattern": values}, "rank_pattern", adapters._rank)
    assert adapters._matched(table, module, 0) == values.get(get_pattern_key(values.keys(), module), 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_read_into_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """B = 1.5, A = -2, alpha / r = 4 / 2: 2 * 1.5 * -2 = -6 a direction, -12 for two of them, exact in every dtype."""
    folder = plain(tmp_path / "a")
    retensor(folder, q0_A=torch.full((2, 8), -2.0, dtype=dtype), q0_B=torch.full((6, 2), 1.5, dtype=dtype))
    update = read(folder).updates[Q0]
    assert update.B.dtype == update.A.dtype == torch.float32
    assert torch.equal(update.dense(), torch.full((6, 8), -12.0))


def test_how_the_base_stores_its_weight_is_no_matter_of_the_adapter(tmp_path: Path) -> None:
    """PEFT sets ``fan_in_fan_out`` for GPT-2's transposed layers; B and A are what they are without it."""
    one, other = read(plain(tmp_path / "a")), read(plain(tmp_path / "b", fan_in_fan_out=True))
    assert one.updates.keys() == other.updates.keys()
    for name, update in one.updates.items():
        assert torch.equal(update.dense(), other.updates[name].dense())


def test_nothing_read_depends_on_the_file_any_more(tmp_path: Path) -> None:
    folder = plain(tmp_path / "a")
    adapter = read(folder)
    before = {name: update.dense().clone() for name, update in adapter.updates.items()}
    size = (folder / WEIGHTS).stat().st_size
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size - size // 2))
    for name, update in adapter.updates.items():
        assert torch.equal(update.dense(), before[name])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA"),
        ({"peft_type": ["LORA"]}, "peft_type must be LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": 1}, "init_lora_weights"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"something_new": {"k": 1}}, "something_new"),
        ({"r": 0}, "a rank in r"),
        ({"r": True}, "a rank in r"),
        ({"r": "2"}, "a rank in r"),
        ({"r": 3}, "rank 2 in lora_A"),
        ({"rank_pattern": {"q": 1.5}}, "a rank in rank_pattern"),
        ({"rank_pattern": [2]}, "rank_pattern must map"),
        ({"rank_pattern": {"(q": 2}}, "no regular expression"),
        ({"rank_pattern": {"(a+)+": 2}}, "for ever"),
        ({"rank_pattern": {"a?" * 30: 2}}, "for ever"),
        ({"rank_pattern": {"(a|a)" * 30: 2}}, "for ever"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"alpha_pattern": {"q": "big"}}, "alpha_pattern"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
    ],
    ids=str,
)
def test_a_config_that_is_not_plain_lora_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    folder = plain(tmp_path / "a", **changes)
    with pytest.raises(FedError) as error:
        read(folder)
    assert words in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q0_A": torch.full((2, 8), float("nan"))}, "layers.0.q.lora_A.weight holds NaN"),
        ({"q0_B": torch.full((6, 2), float("inf"))}, "layers.0.q.lora_B.weight holds NaN or infinite"),
        ({"q0_B": torch.full((6, 2), 3e38)}, "overflows"),
        ({"q0_A": torch.ones(2, 8, dtype=torch.int32)}, "I32"),
        ({"q0_A": torch.ones(2, 8, dtype=torch.float64)}, "F64"),
        ({"q0_A": torch.ones(16)}, "shape [16]"),
        ({"q0_A": torch.ones(2, 8, 1, 1)}, "shape [2, 8, 1, 1]"),
        ({"q0_A": torch.ones(2, 0)}, "shape [2, 0]"),
        ({"q0_A": torch.ones(3, 8)}, "rank 3 in lora_A and 2 in lora_B"),
        ({"q0_A": None}, "has lora_B and not the other"),
        ({"base_model.model.layers.0.q.lora_magnitude_vector": torch.ones(6)}, "lora_magnitude_vector"),
        ({"base_model.model.layers.0.q.lora_B.bias": torch.ones(6)}, "lora_B.bias"),
        ({"base_model.model.lm_head.weight": torch.ones(6, 8)}, "lm_head.weight"),
        ({"base_model.model.emb.lora_embedding_A": torch.ones(2, 8)}, "lora_embedding_A"),
        ({"base_model.model.../../etc/passwd.lora_A.weight": torch.ones(2, 8)}, "passwd"),
        ({"base_model.model.a..b.lora_A.weight": torch.ones(2, 8)}, "a..b"),
        ({"base_model.model.a\nb.lora_A.weight": torch.ones(2, 8)}, "a\\nb"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_that_is_no_finite_factor_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Tensor | None], words: str
) -> None:
    folder = retensor(plain(tmp_path / "a"), **changes)
    with pytest.raises(FedError) as error:
        read(folder)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Boom:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "pwned"),))

    folder = plain(tmp_path / "a")
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Boom()))
    with pytest.raises(FedError, match=r"adapter_model\.bin, a pickle.*save_pretrained"):
        read(folder)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_links_devices_and_absent_files(tmp_path: Path, name: str) -> None:
    elsewhere = plain(tmp_path / "elsewhere") / name
    folder = plain(tmp_path / "a")

    (folder / name).rename(folder / "inside")
    with pytest.raises(FedError, match=f"has no {name}"):
        read(folder)
    (folder / name).symlink_to("inside")
    assert read(folder).rank == 2, "a link that stays in the folder is a name like another"
    for target, words in [
        (elsewhere, "leaves the folder"),
        (Path("/dev/zero"), "leaves the folder"),
        (Path(name), name),
    ]:
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        with pytest.raises(FedError, match=words):
            read(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(FedError, match="not a regular file"):
        read(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(FedError, match="not a regular file"):
        read(folder)


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FedError, match="not a folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(FedError, match="not a folder"):
        read(tmp_path / "file")


def test_what_a_file_claims_is_never_allocated(tmp_path: Path) -> None:
    """Files of a few bytes that claim terabytes, and a file of a terabyte with nothing in it: refused within 64 MiB."""
    key = "base_model.model.layers.0.q.lora_{}.weight"
    huge = {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}
    wrapped = {"dtype": "F32", "shape": [1 << 33, 1 << 33], "data_offsets": [0, 0]}
    empty = {"dtype": "F32", "shape": [1 << 40, 0], "data_offsets": [0, 0]}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case, header in enumerate([{key.format("A"): tensor} for tensor in (huge, wrapped, empty)]):
        with pytest.raises(FedError):
            read(raw(plain(tmp_path / f"claims{case}"), header))
    with pytest.raises(FedError, match="header claims"):
        read(raw(plain(tmp_path / "header"), b"{}", length=1 << 62))
    sparse = plain(tmp_path / "sparse")
    os.truncate(sparse / WEIGHTS, 1 << 40)
    with pytest.raises(FedError, match="at most"):
        read(sparse)
    os.truncate(sparse / WEIGHTS, 1 << 32)  # under the limit: the library finds that nothing claims these bytes
    with pytest.raises(FedError, match="safetensors"):
        read(sparse)
    config = plain(tmp_path / "config")
    os.truncate(config / CONFIG, 1 << 40)
    with pytest.raises(FedError, match="at most"):
        read(config)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "[" * 100_000, '{"r": 1' + "0" * 5000 + "}", "\udcff", '{"r":']
)
def test_a_config_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    folder = plain(tmp_path / "a")
    (folder / CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(FedError, match=CONFIG):
        read(folder)


def survives(folder: Path) -> None:
    """Reading ends in an adapter of finite factors or in one sentence, and leaves no file behind."""
    around = sorted(folder.parent.rglob("*"))
    try:
        updates = read(folder).updates
    except FedError as error:
        assert str(error).isprintable() and len(str(error)) < 2000
    else:
        assert all(bool(torch.isfinite(factor).all()) for update in updates.values() for factor in (update.B, update.A))
    assert sorted(folder.parent.rglob("*")) == around


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(
    name=st.sampled_from([CONFIG, WEIGHTS]),
    cut=st.floats(0, 1),
    noise=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=4),
)
def test_fuzz_truncated_and_flipped_bytes(
    tmp_path_factory: pytest.TempPathFactory, name: str, cut: float, noise: list[tuple[float, bytes]]
) -> None:
    folder = plain(tmp_path_factory.mktemp("fuzz") / "a")
    data = bytearray((folder / name).read_bytes())
    for place, text in noise:
        start = int(place * len(data))
        data[start : start + len(text)] = text
    (folder / name).write_bytes(data[: int(cut * len(data))] if not noise else data)
    survives(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(sorted(LoraConfig(r=2, target_modules=["q"]).to_dict())) | st.text(max_size=8)


@FUZZ
@given(changes=st.dictionaries(KEYS, JSON, max_size=3))
def test_fuzz_configs(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]) -> None:
    folder = plain(tmp_path_factory.mktemp("fuzz") / "a")
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))
    survives(folder)


def test_a_library_s_words_stay_on_one_line(tmp_path: Path) -> None:
    """safetensors quotes the tensor's name, which the sender of the file has chosen."""
    key = "\n\x1b[31mTraceback: everything is fine"
    header = {key: {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}
    with pytest.raises(FedError, match="everything is fine") as error:
        read(raw(plain(tmp_path / "a"), header, bytes(12)))
    assert str(error.value).isprintable()


@FUZZ
@given(
    tensors=st.dictionaries(
        st.sampled_from(
            ["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight", "../../x", "__metadata__"]
        )
        | st.text(max_size=12),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "F16", "F64", "I64", "BOOL", "F8_E4M3", "F4", "X"]),
                "shape": st.lists(st.integers(0, 4) | st.integers(0, 1 << 66), max_size=3),
                "data_offsets": st.lists(st.integers(0, 64) | st.integers(0, 1 << 66), min_size=2, max_size=2),
            }
        ),
        max_size=3,
    ),
    data=st.binary(max_size=64),
)
def test_fuzz_headers(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Any], data: bytes) -> None:
    survives(raw(plain(tmp_path_factory.mktemp("fuzz") / "a"), tensors, data))


# --- writing


def random(shape: tuple[int, int], rank: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator))


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.3])
@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 4, 9), (2, 0, 2)], ids=["equal", "mixed", "one is zero"])
def test_plain_peft_loads_what_is_written(tmp_path: Path, ranks: tuple[int, ...], scale: float) -> None:
    updates = {
        name: random(shape, r, i) for i, ((name, shape), r) in enumerate(zip(SHAPES.items(), ranks, strict=True))
    }
    write(tmp_path / "out", updates, base_model="some/model", scale=scale, task_type=None)
    loaded = deltas(PeftModel.from_pretrained(Net(), str(tmp_path / "out")))
    assert loaded.keys() == updates.keys()
    for name, update in updates.items():
        torch.testing.assert_close(loaded[name], update.dense(), rtol=1e-5, atol=1e-6)
    back = read(tmp_path / "out")
    assert back.base_model == "some/model"
    for name, update in updates.items():
        torch.testing.assert_close(back.updates[name].dense(), update.dense(), rtol=1e-5, atol=1e-6)


def test_at_scale_one_the_factors_are_written_as_they_are(tmp_path: Path) -> None:
    updates = {name: random(shape, 3, 1) for name, shape in SHAPES.items()}
    write(tmp_path / "out", updates, base_model=None, targets=["v", "q"])
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["target_modules"]) == (
        3,
        3,
        {},
        ["v", "q"],
    )
    back = read(tmp_path / "out")
    assert back.targets == ("q", "v") and back.rank == 3
    for name, update in updates.items():
        assert torch.equal(back.updates[name].B, update.B) and torch.equal(back.updates[name].A, update.A)


def test_names_that_end_in_each_other_keep_their_own_rank(tmp_path: Path) -> None:
    """PEFT takes the first name in rank_pattern that is the end of a module's, so the order of the file matters."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 6, bias=False)
            self.inner = nn.ModuleDict(
                {"q": nn.Linear(8, 6, bias=False), "inner": nn.ModuleDict({"q": nn.Linear(8, 6)})}
            )

    updates = {name: random((6, 8), r, r) for name, r in [("q", 1), ("inner.q", 2), ("inner.inner.q", 3)]}
    write(tmp_path / "out", updates, base_model=None, task_type=None)
    loaded = deltas(PeftModel.from_pretrained(Nested(), str(tmp_path / "out")))
    for name, update in updates.items():
        torch.testing.assert_close(loaded[name], update.dense(), rtol=1e-5, atol=1e-6)


def test_a_dense_update_is_written_at_its_numerical_rank(tmp_path: Path) -> None:
    dense = random((6, 8), 2, 0).dense()
    write(tmp_path / "out", {Q0: dense, Q1: torch.zeros(6, 8)}, base_model=None)
    back = read(tmp_path / "out").updates
    assert (back[Q0].rank, back[Q1].rank) == (2, 1)
    torch.testing.assert_close(back[Q0].dense(), dense, rtol=1e-5, atol=1e-6)
    assert torch.equal(back[Q1].dense(), torch.zeros(6, 8))
    assert bool((back[Q1].A != 0).any()), "zeros in both factors would never train"


@pytest.mark.parametrize(
    ("updates", "scale", "words"),
    [
        ({}, 1.0, "no update"),
        ({Q0: torch.full((6, 8), float("nan"))}, 1.0, "NaN"),
        ({Q0: LowRank(torch.full((6, 1), float("inf")), torch.ones(1, 8))}, 1.0, "NaN or infinite"),
        ({Q0: torch.ones(6, 8)}, 0.0, "scale"),
        ({"../q": torch.ones(6, 8)}, 1.0, "not the dotted name"),
    ],
    ids=["nothing", "nan", "inf", "scale", "name"],
)
def test_what_cannot_be_written_leaves_nothing(
    tmp_path: Path, updates: dict[str, Any], scale: float, words: str
) -> None:
    with pytest.raises(FedError, match=words):
        write(tmp_path / "deep" / "out", updates, base_model=None, scale=scale)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_taken_is_left_alone(tmp_path: Path) -> None:
    updates = {Q0: random((6, 8), 2, 0)}
    out = tmp_path / "out"
    out.mkdir()
    write(out, updates, base_model=None)  # empty: taken by nobody
    first = (out / WEIGHTS).read_bytes()
    with pytest.raises(FedError, match="not empty"):
        write(out, {Q0: random((6, 8), 2, 1)}, base_model=None)
    assert (out / WEIGHTS).read_bytes() == first
    write(out, {Q0: random((6, 8), 2, 1)}, base_model=None, overwrite=True)
    assert (out / WEIGHTS).read_bytes() != first
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FedError, match=r"notes\.txt"):
        write(out, updates, base_model=None, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(FedError, match="not a folder"):
        write(out / "notes.txt", updates, base_model=None, overwrite=True)
    with pytest.raises(FedError, match="cannot be written"):
        write(out / "notes.txt" / "deeper", updates, base_model=None)


def test_a_write_that_fails_half_way_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write(out, {Q0: random((6, 8), 2, 0)}, base_model=None)
    first = (out / WEIGHTS).read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        Path(str(args[1])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedllm.storage.peft_folder.save_file", full)
    with pytest.raises(FedError, match="No space left"):
        write(out, {Q0: random((6, 8), 2, 1)}, base_model=None, overwrite=True)
    with pytest.raises(FedError, match="No space left"):
        write(tmp_path / "new", {Q0: random((6, 8), 2, 1)}, base_model=None)
    assert (out / WEIGHTS).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_both_files_can_be_read_by_the_same_people(tmp_path: Path) -> None:
    write(tmp_path / "out", {Q0: random((6, 8), 2, 0)}, base_model=None)
    assert (tmp_path / "out" / WEIGHTS).stat().st_mode == (tmp_path / "out" / CONFIG).stat().st_mode
