import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fedllm.errors import FedError
from fedllm.reports import trackers as tracking
from fedllm.reports.trackers import Trackio, Untracked, flat, open_tracker

RECORD = {
    "round": 2,
    "train_loss": 1.5,
    "weights": {"c0": 0.25, "c1": 0.75},
    "truncation_error": {"c0": 0.1, "c1": 0.0},
    "clients": {"c0": {"rank": 4, "train_loss": 1.6, "note": "text", "ok": True}},
    "eval": {"exact_match": 0.5},
    "refused": {"c2": "NaN in A"},
    "telemetry": {"drift": {"c0": 0.01}},
}
CONFIG = {"run": {"rounds": 3}, "model": {"name": "pico"}}


@pytest.fixture(autouse=True)
def no_trackio_folder_of_the_users(monkeypatch):
    monkeypatch.delenv("TRACKIO_DIR", raising=False)


def kept_by_trackio(folder: Path, run: str) -> list[dict]:
    """What a fresh trackio reads back: one entry a logged round, oldest first."""
    program = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage;"
        "print(json.dumps(SQLiteStorage.get_logs('fedllm', sys.argv[1]), default=str))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, run],
        env=os.environ | {"TRACKIO_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(found.stdout.splitlines()[-1])


def test_a_record_becomes_one_lane_a_client():
    assert flat(RECORD) == {
        "train_loss": 1.5,
        "clients/c0/weight": 0.25,
        "clients/c1/weight": 0.75,
        "clients/c0/truncation_error": 0.1,
        "clients/c1/truncation_error": 0.0,
        "clients/c0/rank": 4.0,
        "clients/c0/train_loss": 1.6,
        "eval/exact_match": 0.5,
        "refused": 1.0,
        "telemetry/drift/c0": 0.01,
    }


def test_a_record_with_holes_is_no_trouble():
    assert flat({"round": 1, "train_loss": None, "eval": None, "weights": None, "clients": []}) == {}


def test_trackio_keeps_the_run_in_its_own_folder_and_a_resumed_run_in_one_piece(tmp_path, capfd):
    run = tmp_path / "demo"
    for index in (1, 2):
        tracker = open_tracker("trackio", run, CONFIG)
        tracker.log(RECORD | {"round": index})
        tracker.close()
        tracker.close()
    logged = kept_by_trackio(run / "trackio", "demo")
    assert [entry["step"] for entry in logged] == [1, 2]
    assert logged[1]["clients/c0/train_loss"] == 1.6
    assert str(run / "trackio") in tracker.hint
    assert capfd.readouterr() == ("", "")


def test_two_runs_of_one_process_do_not_mix(tmp_path):
    trackers = [open_tracker("trackio", tmp_path / name, CONFIG) for name in ("a", "b")]
    for index, tracker in enumerate(trackers, start=1):
        tracker.log({"round": index, "train_loss": 1.0})
    for tracker in trackers:
        tracker.close()
    assert [[entry["step"] for entry in kept_by_trackio(tmp_path / name / "trackio", name)] for name in ("a", "b")] == [
        [1],
        [2],
    ]


def test_trackio_asks_no_server_whatever_the_environment_says(tmp_path, monkeypatch):
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_POST = do_HEAD = do_GET

        def log_message(self, format, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for key, value in {
        "HF_ENDPOINT": address, "HF_TOKEN": "hf_" + "a" * 34, "TRACKIO_SERVER_URL": f"{address}/?write_token=x",
        "TRACKIO_WEBHOOK_URL": address, "TRACKIO_SPACE_ID": "someone/space", "HF_HUB_OFFLINE": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    tracker = open_tracker("trackio", tmp_path / "demo", CONFIG)
    tracker.log(RECORD)
    tracker.close()
    server.shutdown()
    server.server_close()
    assert asked == []
    assert len(kept_by_trackio(tmp_path / "demo" / "trackio", "demo")) == 1


def test_the_run_goes_on_when_trackio_dies(tmp_path, caplog):
    tracker = Trackio(tmp_path, CONFIG)
    tracker._writer.kill()
    tracker._writer.wait()
    for index in (1, 2, 3):
        tracker.log(RECORD | {"round": index})
    tracker.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_trackio_that_does_not_start_is_an_error_by_name_and_a_warning_by_auto(tmp_path, monkeypatch, caplog):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "trackio.py").write_text("raise RuntimeError('half an install')")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    with pytest.raises(FedError, match="trackio did not start"):
        open_tracker("trackio", tmp_path / "run", CONFIG)
    assert "half an install" in (tmp_path / "run" / "trackio" / "writer.log").read_text()
    assert isinstance(open_tracker("auto", tmp_path / "run", CONFIG), Untracked)
    assert "goes on without it" in caplog.text


def test_auto_takes_trackio_where_it_is_installed(tmp_path, monkeypatch):
    tracker = open_tracker("auto", tmp_path / "run", CONFIG)
    tracker.close()
    assert isinstance(tracker, Trackio)
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    assert isinstance(open_tracker("auto", tmp_path / "other", CONFIG), Untracked)
    assert not (tmp_path / "other").exists()


def test_none_leaves_no_trace(tmp_path):
    tracker = open_tracker("none", tmp_path / "run", CONFIG)
    tracker.log(RECORD)
    tracker.close()
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_every_lane_by_round(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = open_tracker("tensorboard", tmp_path, CONFIG)
    for index in (1, 2):
        tracker.log(RECORD | {"round": index, "train_loss": 1 / index})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [(1, 1.0), (2, 0.5)]
    assert "clients/c1/weight" in events.Tags()["scalars"]
    assert str(tmp_path / "tensorboard") in tracker.hint


def test_wandb_is_one_resumable_run_logged_by_round(tmp_path, monkeypatch):
    """A stand-in for the package that notes the calls; the real one needs an account."""
    calls: list = []

    class Run:
        url, dir = "", "somewhere"

        def log(self, numbers, step):
            calls.append((numbers["train_loss"], step))

        def finish(self):
            calls.append("finish")

    class Package:
        @staticmethod
        def init(**settings):
            calls.append((settings["id"], settings["resume"], settings["config"]))
            return Run()

    monkeypatch.setattr(tracking, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "wandb", Package)
    tracker = open_tracker("wandb", tmp_path / "my run", CONFIG)
    tracker.log(RECORD)
    tracker.close()
    assert calls == [("my-run", "allow", CONFIG), (1.5, 2), "finish"]
    assert tracker.hint == "wandb sync somewhere"


@pytest.mark.parametrize("kind", ["trackio", "tensorboard", "wandb"])
def test_a_missing_package_is_named_with_its_remedy(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(FedError, match="pip install") as error:
        open_tracker(kind, tmp_path / "run", CONFIG)
    assert kind in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(FedError, match="'mlflow'.*trackio"):
        open_tracker("mlflow", tmp_path, CONFIG)
