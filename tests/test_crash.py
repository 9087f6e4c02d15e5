"""A run that is killed, at any moment and as often as it likes, and resumed, is the run that was not.

Run as a program this file is the driver: it imports everything once and forks a child for every life of a run, because
twenty imports of torch would be most of the test's time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPE = [
    "recipe=smoke", "run.rounds=4", "run.threads=1", "run.overwrite=false", "worker.steps=1", "worker.optimizer=kept",
    "worker.dropout=0.1", "data.train_rows=24", "data.test_rows=2", "clients.participation=0.75", "eval.generate=false",
    "eval.every=2", "eval.clients=true", "faults={stale: 0.2, drop: 0.1}",
]  # fmt: skip
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}
"""Audit events that change a folder; ``open`` for writing is another."""


def test_a_run_killed_at_twenty_random_moments_is_the_undisturbed_run(tmp_path: Path) -> None:
    """Ten moments by the clock, ten just before a file in the run's folder is changed; SIGKILL each time."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), "20"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=570,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["stopped"] == 130  # Ctrl-C once: the client is finished, all is saved, and it is no success
    assert told["kills"] >= 20 and told["different"] == [] and told["failed"] == []
    rounds = [json.loads(line) for line in (tmp_path / "undisturbed/rounds.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rounds] == [1, 2, 3, 4]
    assert any(row["refused"] or row["suspect"] for row in rounds)  # the faults were there, and were the same ones


@pytest.mark.parametrize("rounds", ["", '{"round": 1, "bro'])
def test_a_run_killed_before_its_first_checkpoint_starts_from_round_one(rounds: str, tmp_path: Path) -> None:
    """What a run's first instants leave: its mark, half a checkpoint, half a line."""
    from fedllm.storage import checkpoint
    from fedllm.storage import run_folder as folder

    run = tmp_path / "run"
    run.mkdir()
    (run / folder.UNFINISHED).write_text("run:\n  rou")
    folder.check(run, resume=False, overwrite=False)  # one file, which no other program writes
    (run / folder.MARK).write_text("{}")
    (run / "rounds.jsonl").write_text(rounds)
    (run / "checkpoint/.writing").mkdir(parents=True)
    (run / "checkpoint/.writing/state.safetensors").write_bytes(b"\x08")
    folder.check(run, resume=True, overwrite=False)
    assert checkpoint.load(run / "checkpoint", {}) is None


def drive(folder: Path, wanted: int) -> dict[str, object]:
    """Kills runs until ``wanted`` kills are spent and the last of them has finished; what became of them."""
    import torch

    torch.set_num_threads(1)
    from fedllm import train  # noqa: F401  the children inherit what is imported here
    from fedllm.federation import text  # noqa: F401
    from fedllm.workers import sft  # noqa: F401

    __import__("trl"), __import__("peft"), __import__("datasets")
    chance = random.Random(0)
    started = time.monotonic()
    reference = folder / "undisturbed"
    changes = folder / "changes"
    assert life(reference, lambda pid: None, count=changes) == 0, (folder / "log").read_text()
    whole, total = time.monotonic() - started, int(changes.read_text())
    kills, different, failed, number = 0, [], [], 0
    while kills < wanted:
        run, number = folder / f"run_{number}", number + 1
        while True:
            if chance.random() < 0.5:
                ended = life(run, lambda pid: None, at=chance.randrange(1, total))
            else:
                wait = chance.uniform(0.0, whole)
                ended = life(run, lambda pid, wait=wait: end_after(pid, wait))
            if ended != -signal.SIGKILL:
                break
            kills += 1
        if ended != 0:
            failed.append(f"{run.name}: {(folder / 'log').read_text()[-2000:]}")
            break
        if left(run) != left(reference):
            different.append(run.name)
    polite = folder / "polite"
    stopped = life(polite, lambda pid: end_in_round_two(pid, polite))
    if life(polite, lambda pid: None) != 0 or left(polite) != left(reference):
        different.append(polite.name)
    return {
        "stopped": stopped,
        "kills": kills,
        "runs": number,
        "changes": total,
        "different": different,
        "failed": failed,
    }


def life(run: Path, meanwhile: Callable[[int], None], *, at: int = 0, count: Path | None = None) -> int:
    """One process of the run, resumed where there is something to resume; its exit status, negative for a signal.

    Args:
        at: the child kills itself just before its change number ``at`` to the run's folder.
        count: where it writes how many changes it made.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            log = os.open(run.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            seen = [0]

            def watch(event: str, arguments: tuple) -> None:
                change = event in CHANGES or (
                    event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
                )
                if change and str(run) in str(arguments[0]):
                    seen[0] += 1
                    if seen[0] == at:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(watch)
            from fedllm.train import main

            resume = str((run / "partition.json").is_file()).lower()
            status = main([*RECIPE, f"run.output={run}", f"run.resume={resume}"])
            if count is not None:
                count.write_text(str(seen[0]))
        finally:
            sys.stdout.flush()
            os._exit(status)
    meanwhile(child)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def end_after(pid: int, seconds: float, by: int = signal.SIGKILL) -> None:
    """A signal once the time is over; nothing where the process has ended before."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.005)
    os.kill(pid, by)


def end_in_round_two(pid: int, run: Path) -> None:
    """Ctrl-C once the first of the four rounds is told: by the run's own word, for no clock knows how fast it is."""
    told = run / "rounds.jsonl"
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if told.is_file() and told.read_text().endswith("\n"):
            os.kill(pid, signal.SIGINT)
            return
        time.sleep(0.005)


def left(run: Path) -> tuple[bytes, list[dict], list[dict]]:
    """What a run leaves for others, without what a clock said: adapter, rounds with their ledger, scores."""
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
        for client in row["clients"].values():
            del client["seconds"]
    scores = json.loads((run / "summary.json").read_text())["rows"]
    return (run / "adapter/adapter_model.safetensors").read_bytes(), rows, scores


if __name__ == "__main__":
    print(json.dumps(drive(Path(sys.argv[1]), int(sys.argv[2]))))
