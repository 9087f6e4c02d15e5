"""Kills, restarts and strangers, with the real programs on loopback."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr")

import httpx  # noqa: E402
from flower_lab import Lab, command, environment, rehearsal, same_run, simulated  # noqa: E402

from fedllm.fleets.flower import api  # noqa: E402

pytestmark = pytest.mark.slow

RECIPE = [
    *("recipe=smoke", "data.train_rows=24", "data.test_rows=4", "run.threads=1", "eval.base=false"),
    *("eval.generate=false", "clients.rank=[8,2]", "worker.optimizer=kept", "worker.steps=40", "worker.batch_size=1"),
]


@pytest.fixture
def lab(tmp_path):
    made = Lab(tmp_path, rehearsal())
    yield made
    made.close()


@pytest.fixture(scope="module")
def near(tmp_path_factory):
    """The same recipe in one process."""
    folder = tmp_path_factory.mktemp("near")
    simulated(folder, [*RECIPE, "run.output=near"])
    return folder / "near"


def begun(lab: Lab, *words: str) -> None:
    """Two nodes and a server that run the recipe."""
    for client in ("c0", "c1"):
        lab.node(client)
        lab.join(client)
    lab.serve(*RECIPE, "run.output=far", "--rehearsal", *words)


def trainings(lab: Lab, client: str) -> int:
    return (lab.folder / client / "log.jsonl").read_text().count("\n")


def test_a_node_that_is_killed_in_a_round_comes_back(lab, near):
    begun(lab)
    lab.until("c0", "round 2: training")
    lab.kill("c0")
    lab.join("c0")
    assert lab.ended("server") == 0
    same_run(lab.folder / "far", near)
    assert trainings(lab, "c1") == 2
    assert trainings(lab, "c0") == 2  # round 2 was logged once: the first try was cut off


def test_a_node_that_is_killed_with_its_reply_on_disk_trains_no_second_time(lab, near):
    begun(lab)
    lab.until("c0", "round 1: trained")
    lab.kill("c0")
    lab.join("c0")
    assert lab.ended("server") == 0
    same_run(lab.folder / "far", near)
    assert trainings(lab, "c0") == 2


def test_a_superlink_that_is_killed_in_a_round_is_started_again(lab, near):
    begun(lab)
    lab.until("c0", "round 2: training")
    (superlink,) = lab.children("server")
    os.kill(superlink, signal.SIGKILL)
    assert lab.ended("server") == 0
    assert "the SuperLink ended; it is started again" in lab.said("server")
    same_run(lab.folder / "far", near)
    assert trainings(lab, "c0") == trainings(lab, "c1") == 2


def test_a_server_that_is_killed_in_a_round_goes_on_with_what_its_nodes_kept(lab, near):
    begun(lab)
    lab.until("c0", "round 2: trained")
    lab.kill("server")
    lab.serve(*RECIPE, "run.output=far", "--rehearsal", "run.resume=true")
    assert lab.ended("server") == 0
    same_run(lab.folder / "far", near)
    assert trainings(lab, "c0") == trainings(lab, "c1") == 2


def test_ctrl_c_ends_a_server_whose_client_hangs(lab, near):
    begun(lab)
    lab.until("c0", "round 2: training")
    lab.running["c0"].send_signal(signal.SIGSTOP)
    try:
        lab.until("c1", "round 2: trained")
        began = time.monotonic()
        lab.running["server"].send_signal(signal.SIGINT)
        assert lab.ended("server", 20) == 130
        assert time.monotonic() - began < 5
    finally:
        lab.running["c0"].send_signal(signal.SIGCONT)
    assert "run.resume=true goes on from there" in lab.said("server")
    lab.serve(*RECIPE, "run.output=far", "--rehearsal", "run.resume=true")
    assert lab.ended("server") == 0
    same_run(lab.folder / "far", near)


def test_a_deadline_ends_a_run_that_nobody_answers_and_keeps_the_round_before(lab):
    begun(lab, "run.deadline=40", "run.attempts=1")
    lab.until("server", "round 1/2")
    for client in ("c0", "c1"):
        lab.running[client].send_signal(signal.SIGSTOP)
    try:
        assert lab.ended("server", 120) == 2
    finally:
        for client in ("c0", "c1"):
            lab.running[client].send_signal(signal.SIGCONT)
    assert "c0: no answer within 40 s" in lab.said("server") and "Round 1 is kept" in lab.said("server")
    assert (lab.folder / "far" / "checkpoint" / "round_0001").is_dir()


def test_strangers_are_told_in_one_sentence(lab, tmp_path_factory):
    """Wrong certificate authority, unknown key, stolen key, plain HTTP; and what the port gives without a key."""
    other = Lab(tmp_path_factory.mktemp("other"), rehearsal())
    for client in ("c0", "c1"):
        lab.node(client)
    lab.serve(*RECIPE, "run.output=far", "--rehearsal")
    lab.until("server", "nodes are awaited")
    wrong = lab.node("wrong", allowed=False)
    (wrong / "ca.crt").write_bytes((other.deploy / "ca.crt").read_bytes())
    lab.node("unknown", allowed=False)
    stolen = lab.node("stolen", allowed=False)
    for name in ("node", "node.pub"):
        (stolen / name).write_bytes((lab.folder / "c1" / name).read_bytes())
    lab.node("plain", allowed=False, insecure=True)
    for client, words in (
        ("wrong", "shows a certificate that"),
        ("unknown", "does not know this node's key: its operator runs `fedllm serve allow DEPLOY unknown node.pub`"),
        ("stolen", "knows this node's key as client c1, not stolen"),
        ("plain", "does not speak plain HTTP"),
    ):
        done = command("join", client, cwd=lab.folder)
        assert done.returncode == 2, (client, done.stderr)
        assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    import ssl

    trusted = ssl.create_default_context(cafile=str(lab.deploy / "ca.crt"))
    at = f"https://127.0.0.1:{lab.port}"
    for path in ("/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task", "/docs"):
        assert httpx.post(at + path, verify=trusted).status_code == 403
        assert httpx.get(at + path, verify=trusted).status_code == 403
    assert httpx.post(f"{at}/v1/fleet/register-node", verify=trusted).status_code == 401


def test_a_nodes_tasks_are_for_whoever_has_its_secret(lab):
    site = lab.node("c0")
    (site / "policy.yaml").write_text((site / "policy.yaml").read_text() + f"port: {(port := api_port())}\n")
    lab.serve(*RECIPE, "run.output=far", "--rehearsal")
    lab.until("server", "nodes are awaited")
    lab.join("c0")
    lab.until("server", "client c0 is ready")
    link = api.Link(f"127.0.0.1:{port}")
    for secret in (b"x" * 32, (lab.deploy / "link.secret").read_bytes()):
        client = api._acquirer(link, secret, api.Retry(seconds=1))
        with pytest.raises(api.Gone, match="401"):
            client.AcquireTask(api.AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))


def api_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_foreign_bundle_is_answered_and_never_run(lab, monkeypatch, tmp_path):
    """Someone on the server's own machine starts a run whose code writes a file."""
    lab.node("c0")
    lab.node("c1")
    lab.serve(*RECIPE, "run.output=far", "--rehearsal")
    lab.until("server", "nodes are awaited")
    lab.join("c0")
    lab.until("server", "client c0 is ready")
    mark = tmp_path / "ran"
    evil = dict(api._BUNDLE) | {"fedllm_run/none.py": f"open({str(mark)!r}, 'w')\napp = None\n".encode()}
    content, _ = api.build_fab_from_files(evil)
    import hashlib

    bundle = api.Fab(hashlib.sha256(content).hexdigest(), content, {})
    monkeypatch.setattr(api, "bundle", lambda: bundle)
    (superlink,) = lab.children("server")
    words = Path(f"/proc/{superlink}/cmdline").read_text().split("\0")
    link = api.Link(f"127.0.0.1:{words[words.index('--port') + 1]}", (lab.deploy / "ca.crt").read_bytes())
    with api.Grid(link, (lab.deploy / "link.secret").read_bytes()) as grid:
        (node,) = grid.nodes()
        sent = grid.push(node, {"do": "hello"})
        answers: list[api.Answer] = []
        end = time.monotonic() + 60
        while not answers and time.monotonic() < end:
            answers += [answer for _, answer in grid.pull([sent])]
            time.sleep(0.2)
    assert (answers[0].code, answers[0].reason[:34]) == (api.FOREIGN, "this node runs no code from a serv")
    assert "nothing of it was run" in lab.said("c0") and not mark.exists()


def test_nothing_calls_home(lab, monkeypatch):
    """Every connection through a proxy that takes none and counts them."""
    counted: list[object] = []
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()

        def refuse() -> None:
            while True:
                try:
                    one, where = proxy.accept()
                except OSError:
                    return
                counted.append(where)
                one.close()

        threading.Thread(target=refuse, daemon=True).start()
        at = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, at)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        assert environment()["HTTPS_PROXY"] == at
        begun(lab)
        assert lab.ended("server") == 0
        proxy.shutdown(socket.SHUT_RDWR)
    assert counted == []
