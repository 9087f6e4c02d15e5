"""A federation of real programs on loopback: stock SuperLink and SuperNodes, TLS, node keys, the gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from flower_lab import Lab, rehearsal, same_run, simulated  # noqa: E402

SMOKE = ["recipe=smoke", "data.train_rows=24", "data.test_rows=4", "worker.steps=2", "run.threads=1", "eval.base=false"]
SMALL = [*SMOKE, "eval.generate=false"]


@pytest.fixture
def lab(tmp_path):
    made = Lab(tmp_path, rehearsal())
    yield made
    made.close()


def test_two_nodes_give_the_simulations_adapter_bit_for_bit(lab):
    """Kept moments: what a client remembers stays on its node, and the server keeps its digest."""
    recipe = [*SMALL, "clients.rank=[8,2]", "worker.optimizer=kept"]
    for client in ("c0", "c1"):
        lab.node(client)
        lab.join(client)
    lab.serve(*recipe, "run.output=far", "--rehearsal")
    simulated(lab.folder, [*recipe, "run.output=near"])
    assert lab.ended("server") == 0, lab.said("server")
    same_run(lab.folder / "far", lab.folder / "near")
    assert remembered(lab.folder / "far") < 2_000 < remembered(lab.folder / "near")
    assert len(list((lab.folder / "c0" / "memory").iterdir())) == 2
    assert (lab.folder / "c0" / "log.jsonl").read_text().count("\n") == 2
    assert not (lab.deploy / "link.db").exists()


def remembered(run: Path) -> int:
    """Bytes that the last checkpoint keeps of what clients remember."""
    return sum(path.stat().st_size for path in (run / "checkpoint" / "round_0002").glob("memory_*"))


def test_the_version_of_flower_is_the_one_that_was_tested(monkeypatch):
    from fedllm.errors import FedError
    from fedllm.fleets import flower

    flower.require_flower()
    monkeypatch.setattr(flower, "version", lambda name: "1.43.0")
    with pytest.raises(FedError, match="flwr 1.43.0 is installed, and fedllm talks to flwr 1.42"):
        flower.require_flower()


def test_the_bundle_of_a_run_is_a_constant_without_code():
    """Another hash would make nodes of one version refuse the server of another."""
    import io
    import zipfile

    from fedllm.fleets.flower import api

    assert api.bundle().hash_str == "807dcb553dc04782b7fb6c34c4b7c9662a3fdeb759367e33f25a04674c0ca11c"
    with zipfile.ZipFile(io.BytesIO(api.bundle().content)) as archive:
        code = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".py"))
    assert code.split() == [b"app", b"=", b"None"]


def test_a_note_and_bytes_survive_a_message():
    from fedllm.fleets.flower import api

    content = api.record({"do": "train", "round": 3}, b"\0\1" * 1000)
    assert api.read(content, 10_000) == ({"do": "train", "round": 3}, b"\0\1" * 1000)
    with pytest.raises(ValueError, match="and 1000 are the most"):
        api.read(content, 1000)
    assert json.loads(content.config_records["note"]["json"])["do"] == "train"
