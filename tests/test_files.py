"""The folder of a run: nothing is written or sent through a link, and a disk that refuses is told in a sentence."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedllm.errors import FedError
from fedllm.reports import report
from fedllm.storage import checkpoint, files
from fedllm.storage import run_folder as folder

ROOT = Path(__file__).parents[1]
SMALL = [
    "recipe=smoke", "run.overwrite=false", "worker.steps=1", "data.train_rows=24", "data.test_rows=2",
    "eval.generate=false", "run.threads=1", "run.tracker=none",
]  # fmt: skip


def train(out: Path, *arguments: str, **more: Any) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fedllm.cli", "train", *SMALL, f"run.output={out}", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one round."""
    out = tmp_path_factory.mktemp("runs") / "run"
    done = train(out, "run.rounds=1")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_a_link_at_either_name_is_replaced_and_never_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in (".notes.json.writing", "notes.json"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(precious)
        files.write(tmp_path / "notes.json", "{}")
        assert precious.read_text() == "mine" and (tmp_path / "notes.json").read_text() == "{}"
        assert not (tmp_path / "notes.json").is_symlink()
    (tmp_path / "lines.jsonl").symlink_to(precious)
    with pytest.raises(FedError, match="nothing is written through links"):
        files.append(tmp_path / "lines.jsonl", "x")
    (tmp_path / "eval").symlink_to(tmp_path)
    with pytest.raises(FedError, match="put a folder there"):
        files.make_folder(tmp_path / "eval")


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), os.mkfifo, lambda p: p.symlink_to("/dev/zero")])
def test_only_regular_files_are_read(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "file")
    with pytest.raises(FedError, match=r"no regular file|is a link|Is a directory"):
        files.read_bytes(tmp_path / "file", 100)


def test_a_file_limit_is_told_and_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    files.write(tmp_path / "notes", "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(FedError, match="limit for files"):
            files.write(tmp_path / "notes", "x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"] and (tmp_path / "notes").read_text() == "whole"


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2_000, 9_000, 30_000])
def test_a_run_that_the_disk_fails_keeps_its_rounds(limit: int, copy: Path) -> None:
    """One sentence, exit code 2, and afterwards the run goes on where it was."""
    cap = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    stopped = train(copy, "run.rounds=2", "run.resume=true", preexec_fn=cap)
    assert stopped.returncode == 2 and "Traceback" not in stopped.stderr, stopped.stderr
    assert stopped.stderr.count("\n") == 2  # what follows the new number of rounds, and the sentence
    assert "limit for files" in stopped.stderr and "run.resume=true goes on" in stopped.stderr
    again = train(copy, "run.rounds=2", "run.resume=true")
    assert again.returncode == 0 and len((copy / "rounds.jsonl").read_text().splitlines()) == 2


def test_a_folder_that_disappears_is_told(tmp_path: Path) -> None:
    from fedllm.train import _kept

    with pytest.raises(FedError, match=r"no longer there.*no run in that folder any more"), _kept(tmp_path / "run"):
        files.append(tmp_path / "run" / "rounds.jsonl", "{}\n")
    with pytest.raises(FedError, match="no longer there"):
        files.make_folder(tmp_path / "run" / "checkpoint")


@pytest.mark.parametrize("name", [".rounds.jsonl.writing", "rounds.jsonl", "eval", "plots", "checkpoint", "adapter"])
def test_a_resumed_run_writes_through_no_link(name: str, copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    if (copy / name).is_dir() or (copy / name).exists():
        (copy / name).rename(outside)
    else:
        outside.write_text("precious")
    before = sorted((str(p), p.stat().st_mtime_ns) for p in [outside, *outside.rglob("*")])
    (copy / name).symlink_to(outside)
    with pytest.raises(FedError, match="is a link"):
        folder.check(copy, resume=True, overwrite=False)
    if name == "plots":
        with pytest.raises(FedError, match="put a folder there"):
            report.write(copy)
    assert sorted((str(p), p.stat().st_mtime_ns) for p in [outside, *outside.rglob("*")]) == before


def test_there_is_nothing_to_resume_where_there_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "typo", tmp_path / "empty"):
        with pytest.raises(FedError, match="no run in run.output=.* to resume"):
            folder.check(out, resume=True, overwrite=False)


def forged(place: Path, change: Any) -> None:
    """The manifest with a change, and a digest that vouches for it."""
    manifest = json.loads((place / "checkpoint.json").read_text().partition("\n")[2])
    change(manifest)
    body = json.dumps(manifest)
    (place / "checkpoint.json").write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}\n")


FORGERIES = {
    "no clients": lambda m: m["records"][0].pop("clients"),
    "no digest": lambda m: [c.pop("digest") for c in m["records"][0]["clients"].values()],
    "no round": lambda m: m["records"][0].pop("round"),
    "round a text": lambda m: m["records"][0].update(round="1"),
    "clients a list": lambda m: m["records"][0].update(clients=[]),
    "no records": lambda m: m.update(records=[]),
    "a score a text": lambda m: next(iter(m["records"][0]["clients"].values())).update(own_loss="x"),
    "no number of rounds": lambda m: m["recipe"]["run"].pop("rounds"),
    "interrupted a list": lambda m: m.update(interrupted=[1]),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forged_record_is_refused_in_a_sentence(what: str, copy: Path) -> None:
    page = json.loads((copy / "checkpoint/round_0001/checkpoint.json").read_text().partition("\n")[2])["recipe"]
    forged(copy / "checkpoint/round_0001", FORGERIES[what])
    shutil.rmtree(copy / "checkpoint/round_0000")
    with pytest.raises(FedError, match=r"no checkpoint .* is whole"):
        checkpoint.load(copy / "checkpoint", page)


def test_a_round_written_again_is_never_missing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every change to the folder a whole checkpoint of round 1 is there: the loop stops at each in turn."""
    page = json.loads((copy / "checkpoint/round_0001/checkpoint.json").read_text().partition("\n")[2])["recipe"]
    done = checkpoint.load(copy / "checkpoint", page)
    assert done is not None
    removed: list[str] = []
    real = shutil.rmtree

    def watched(path: Any, *rest: Any, **more: Any) -> None:
        if Path(path).name.startswith("round_"):
            known = checkpoint.load(copy / "checkpoint", page)
            removed.append(Path(path).name)
            assert known is not None and known.index == 1
        real(path, *rest, **more)

    monkeypatch.setattr(shutil, "rmtree", watched)
    checkpoint.save(copy / "checkpoint", done)
    assert removed == ["round_0001"] and (copy / "checkpoint/round_0001_2").is_dir()
    checkpoint.save(copy / "checkpoint", done)
    assert sorted(path.name for path in (copy / "checkpoint").iterdir()) == ["round_0000", "round_0001_3"]


def test_two_evaluations_do_not_share_an_output(tmp_path: Path) -> None:
    from fedllm.evaluation.run import evaluate

    with (
        folder.held(tmp_path / "out", "output"),
        pytest.raises(FedError, match="another process is writing in output="),
    ):
        evaluate("word_problems", ["model=pico", "data.test_rows=2", "generate=false", f"output={tmp_path / 'out'}"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.popitem(), "is missing"),
        (lambda state: state.update(q=state["q"].double()), "is torch.float64"),
        (lambda state: state.update(q=state["q"].int()), "is torch.int32"),
    ],
)
def test_a_state_of_another_model_does_not_go_on(change: Any, said: str) -> None:
    import torch

    first = {"k": torch.zeros(2), "q": torch.zeros(2)}
    checkpoint.check_state(
        checkpoint.Checkpoint(1, first | {"held/c0": torch.zeros(1)}, {}, [], {}), first, Path("run")
    )
    state = dict(first)
    change(state)
    with pytest.raises(FedError, match=said):
        checkpoint.check_state(checkpoint.Checkpoint(1, state, {}, [], {}), first, Path("run"))


def test_paths_of_a_recipe_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's page works from another folder; names of the Hub and paths that nobody has stay as they are."""
    from fedllm.config.paths import absolute
    from fedllm.recipe import page as recipes

    (tmp_path / "rows").mkdir()
    monkeypatch.chdir(tmp_path)
    page = recipes.load(["recipe=smoke", "data.path=rows"]).page
    assert page["data"]["path"] == str(tmp_path / "rows") and page["model"]["name"] == "pico"
    for name in ("org/model", "~nobody-of-that-name/x", "a" * 5000, "a\0b"):
        assert absolute(name) == name
    assert absolute("rows") == str(tmp_path / "rows")


def test_extras_are_installed_from_the_checkout() -> None:
    """``fedllm`` on the public index is somebody else's."""
    told = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "pyproject.toml", ROOT / "Makefile"]
    told += [*(ROOT / "docs").rglob("*.md"), *(ROOT / "fedllm").rglob("*.py")]
    for page in told:
        assert not re.search(r"pip install [\"'\\]*fedllm", page.read_text(encoding="utf-8")), page


def test_what_a_kill_left_of_an_adapter_is_removed(copy: Path) -> None:
    for name in (".adapter.98c1b6da.old", ".adapter.98c1b6db.new"):
        shutil.copytree(copy / "adapter", copy / name)
    before = {path.name for path in copy.iterdir()}
    folder.prepare(copy, (copy / "recipe.yaml").read_text(), {}, overwrite=False)
    assert before - {path.name for path in copy.iterdir()} == {".adapter.98c1b6da.old", ".adapter.98c1b6db.new"}


def test_a_stop_before_a_run_is_begun_promises_no_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedllm import train

    def stopped(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "build_federation", stopped)
    assert train.main(["recipe=smoke", f"run.output={tmp_path / 'run'}"]) == 130
    assert "no run was begun" in capsys.readouterr().err


def test_an_error_of_the_system_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    from fedllm.cli import main

    assert main(["report", "x" * 300]) == 2
    told = capsys.readouterr().err
    assert told.startswith("fedllm: ") and len(told.splitlines()) == 1 and "too long" in told
    assert main(["evaluate", "model=pico", "task=gsm8k", "data=rows.jsonl"]) == 2
    assert "data.path=rows.jsonl" in capsys.readouterr().err
