"""Checkpoints: what is saved is what is loaded, and nothing else ever is."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedllm.core import Client, Failed, Reply, Round
from fedllm.errors import FedError
from fedllm.lowrank import LowRank
from fedllm.storage import checkpoint
from fedllm.storage.checkpoint import Checkpoint, load, save

PAGE = {"run": {"seed": 0, "rounds": 3}, "worker": {"learning_rate": 0.1}}


def record(index: int) -> dict:
    client = {"digest": "0" * 16, "own_loss": 1.5}
    return {"round": index, "clients": {"c0": client}, "weights": {"c0": 1.0}, "refused": {}, "eval": {}}


def made(index: int) -> Checkpoint:
    """A state with products of rank 2 and 0, a dense, an integer and a repeated tensor; two clients that remember."""
    generator = torch.Generator().manual_seed(index)
    W = torch.randn(4, 3, generator=generator)
    state = {
        "W/q": LowRank(torch.randn(4, 2, generator=generator), torch.randn(2, 3, generator=generator)),
        "W/k": LowRank.zeros(4, 3),
        "dense": W,
        "again": W,
        "r_max": torch.tensor(7),
        "half": W.bfloat16(),
    }
    memories = {"c1": {"step": torch.ones(())}, "c/../0": {"q/exp_avg": W.T.contiguous()}}
    return Checkpoint(index, state, memories, [record(n) for n in range(1, index + 1)], PAGE)


def flat(value: object) -> object:
    """Something that compares: tensors as their bits, products as two tensors."""
    if isinstance(value, LowRank):
        return flat(value.B), flat(value.A)
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.double().tolist()
    if isinstance(value, Reply):
        return value.client, flat(value.returned), dict(value.metrics)
    if isinstance(value, dict):
        return {key: flat(item) for key, item in sorted(value.items())}
    if isinstance(value, Checkpoint):
        return [flat(item) for item in vars(value).values()]
    return [flat(item) for item in value] if isinstance(value, list | tuple) else value


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, made(3))
    assert flat(load(tmp_path, PAGE)) == flat(made(3))


def test_an_interrupted_round_comes_back_with_its_clients(tmp_path: Path) -> None:
    """One that replied, one that failed; the reply without what was sent to it."""
    product = LowRank(torch.ones(4, 1), torch.ones(1, 3))
    done = Reply(Client("a", 5, 1), {"q": product}, {"q": product}, {"train_loss": 0.5})
    failed = Failed(Client("b", 5, 2, depth=3), "it broke")
    part = replace(
        made(1), interrupted=Round(2, 0, rounds=3, attempt=1), finished=[(done, {"n": torch.ones(1)}), (failed, {})]
    )
    save(tmp_path, made(1))
    save(tmp_path, part)  # in the place of the one without
    got = load(tmp_path, PAGE)
    assert got is not None and got.interrupted == part.interrupted
    assert flat(got) == flat(replace(part, finished=[(replace(done, sent={}), {"n": torch.ones(1)}), (failed, {})]))


def test_old_ones_and_half_ones_are_pruned(tmp_path: Path) -> None:
    (tmp_path / ".writing").mkdir()
    (tmp_path / ".writing/state.safetensors").write_bytes(b"half")
    for index in (1, 2, 9, 10):
        save(tmp_path, made(index))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round_0009", "round_0010"]


def test_an_earlier_one_is_taken_where_there_is_one(tmp_path: Path) -> None:
    for index in (1, 2):
        save(tmp_path, made(index))
    rounds = [(load(tmp_path, PAGE, until=until) or made(0)).index for until in (None, 2, 1, 0)]
    assert rounds == [2, 2, 1, 2]


def test_another_recipe_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    save(tmp_path, made(1))
    other = {"run": {"seed": 1, "rounds": 9}, "worker": {"learning_rate": 0.2}, "data": {"name": "x"}}
    with pytest.raises(FedError) as caught:
        load(tmp_path, other)
    for words in ("run.seed is 1 now and was 0", "worker.learning_rate is 0.2", "data is", "another run.output"):
        assert words in str(caught.value)
    assert "rounds" not in str(caught.value)


def test_what_mends_a_stopped_run_may_change(tmp_path: Path) -> None:
    save(tmp_path, made(1))
    mended = {**PAGE, "run": {**PAGE["run"], "quorum": 0.1}, "robust": {"name": "clip"}, "admission": {"norm_bound": 3}}
    assert load(tmp_path, mended) is not None


FILES = ["checkpoint.json", "state.safetensors", "memory_0.safetensors", "memory_1.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["truncated", "flipped", "longer", "absent", "empty", "folder", "link", "device"])
def test_a_harmed_file_is_noticed_and_the_one_before_is_used(name: str, harm: str, tmp_path: Path) -> None:
    """A link to a good copy of the file is harm too: it is not what was written."""
    folder = tmp_path / "checkpoint"
    save(folder, made(1))
    save(folder, made(2))
    file = folder / "round_0002" / name
    good = file.read_bytes()
    file.unlink()
    half = len(good) // 2
    if harm in {"truncated", "flipped", "longer", "empty"}:
        flipped = good[:half] + bytes([good[half] ^ 1]) + good[half + 1 :]
        file.write_bytes({"truncated": good[:-5], "flipped": flipped, "longer": good + b" ", "empty": b""}[harm])
    elif harm == "folder":
        file.mkdir()
    elif harm != "absent":
        (tmp_path / "copy").write_bytes(good)
        file.symlink_to(tmp_path / "copy" if harm == "link" else "/dev/zero")
    got = load(folder, PAGE)
    assert got is not None and flat(got) == flat(made(1))
    shutil.rmtree(folder / "round_0001")
    with pytest.raises(FedError, match=r"no checkpoint .* is whole.*round_0002.*run.overwrite=true"):
        load(folder, PAGE)


def forged(folder: Path, manifest: object) -> None:
    """A manifest that is what its own digest says, whatever it holds."""
    body = json.dumps(manifest)
    (folder / "checkpoint.json").write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}\n")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["round", "recipe", "records", "clients", "interrupted", "finished", "sha256"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(KEYS), anything, max_size=3), whole=st.booleans())
def test_fuzz_manifests_that_their_writer_signed(
    changes: dict, whole: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A sentence, or a checkpoint whose index is a number; never another exception."""
    folder = tmp_path_factory.mktemp("forged")
    save(folder, made(1))
    path = folder / "round_0001"
    manifest = json.loads((path / "checkpoint.json").read_text().partition("\n")[2])
    forged(path, manifest | changes if whole else changes)
    try:
        got = load(folder, PAGE)
    except FedError:
        return
    assert got is not None and isinstance(got.index, int) and flat(got.state) == flat(made(1).state)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), at=st.integers(0, 10**6), put=st.binary(max_size=40), cut=st.booleans())
def test_fuzz_bytes(name: str, at: int, put: bytes, cut: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any bytes anywhere, with what follows or without: the same checkpoint, or a sentence."""
    folder = tmp_path_factory.mktemp("bytes")
    save(folder, made(1))
    file = folder / "round_0001" / name
    good = file.read_bytes()
    at %= len(good) + 1
    file.write_bytes(good[:at] + put + (b"" if cut else good[at + len(put) :]))
    try:
        got = load(folder, PAGE)
    except FedError:
        assert file.read_bytes() != good
        return
    assert file.read_bytes() == good and flat(got) == flat(made(1))


@pytest.mark.parametrize("claim", [{"finished": 10**18}, {"finished": -1}, {"round": 2}, {"clients": ["c"] * 3}])
def test_a_manifest_is_not_believed_in_what_it_claims(claim: dict, tmp_path: Path) -> None:
    save(tmp_path, made(1))
    manifest = json.loads((tmp_path / "round_0001/checkpoint.json").read_text().partition("\n")[2])
    forged(tmp_path / "round_0001", manifest | claim)
    with pytest.raises(FedError, match="no checkpoint .* is whole"):
        load(tmp_path, PAGE)


def signed(folder: Path, name: str, content: bytes) -> None:
    """``content`` as the checkpoint's file, and a manifest that vouches for it."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "checkpoint.json").read_text().partition("\n")[2])
    forged(folder, manifest | {"sha256": manifest["sha256"] | {name: hashlib.sha256(content).hexdigest()}})


def header(**tensors: dict) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


HUGE = {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}
SIGNED = {
    "a huge shape": header(q=HUGE),
    "a header of 2^60 bytes": (1 << 60).to_bytes(8, "little") + b"{}",
    "a product without its other factor": header(**{"q#B": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}})
    + b"\0" * 4,
    "factors that do not fit": header(
        **{
            "q#B": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]},
            "q#A": {"dtype": "F32", "shape": [2, 1], "data_offsets": [4, 12]},
        }
    )
    + b"\0" * 12,
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",
    "nested brackets": (10**5).to_bytes(8, "little") + b"[" * 10**5,
}


@pytest.mark.parametrize("what", SIGNED)
def test_a_state_that_its_writer_signed_costs_no_memory(what: str, tmp_path: Path) -> None:
    """Refused in a sentence, within 64 MB: nothing that a file claims is allocated before it is there."""
    save(tmp_path, made(1))
    signed(tmp_path / "round_0001", "state.safetensors", SIGNED[what])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FedError, match="no checkpoint .* is whole"):
        load(tmp_path, PAGE)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # kB


@pytest.mark.parametrize("text", ["[" * 10**5, "", "\n", "{}", "\x00", '0\n{"round": 1}'])
def test_a_manifest_that_is_none(text: str, tmp_path: Path) -> None:
    save(tmp_path, made(1))
    (tmp_path / "round_0001/checkpoint.json").write_text(text)
    with pytest.raises(FedError, match="no checkpoint .* is whole"):
        load(tmp_path, PAGE)
    body = "[" * 10**5
    (tmp_path / "round_0001/checkpoint.json").write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}\n")
    with pytest.raises(FedError, match="no checkpoint .* is whole"):
        load(tmp_path, PAGE)


def test_a_manifest_longer_than_any_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, made(1))
    monkeypatch.setattr(checkpoint, "LONGEST", 100)
    with pytest.raises(FedError, match="more than any manifest"):
        load(tmp_path, PAGE)


def test_only_folders_of_rounds_are_looked_at(tmp_path: Path) -> None:
    for name in ("round_", "round_x", "round_0001.bak", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "round_0007").write_text("a file")
    assert load(tmp_path, PAGE) is None
    assert load(tmp_path / "nowhere", PAGE) is None
