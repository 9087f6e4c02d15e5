"""One tracking run per federation, logged from the server, with a lane for every client.

A tracker on each client's trainer would open one run per client and round; here a round's record is flattened once:
``train_loss``, ``eval/exact_match``, ``clients/c0/train_loss``, ``clients/c0/weight``, ``telemetry/...``, by round.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Literal, Protocol, get_args

Kind = Literal["none", "auto", "trackio", "tensorboard", "wandb"]
Config = Mapping[str, Any]

PROJECT = "fedllm"
INSTALL = {
    "trackio": 'pip install -e ".[tracking]" in the checkout',
    "tensorboard": 'pip install -e ".[tracking]" in the checkout',
    "wandb": "pip install wandb",
}
LANES = {"weights": "weight", "truncation_error": "truncation_error"}
"""What a record holds by client id, and its name in the client's lane."""

AWAY = {"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_DATASET_ID", "TRACKIO_WEBHOOK_URL"}
AWAY |= {"TRACKIO_WRITE_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}
END = "end"
PATIENCE = 60
"""Seconds that trackio has to write what is pending."""

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where the rounds of a run are logged. A tracker that fails after it was opened warns once and stays quiet."""

    @property
    def hint(self) -> str:
        """How to look at it, for a person; empty where there is nothing to look at."""

    def log(self, record: Mapping[str, Any]) -> None:
        """One round's record, as ``rounds.jsonl`` gets it."""

    def close(self) -> None:
        """Writes what is pending. May be called twice."""


def open_tracker(kind: str, run: Path, config: Config) -> Tracker:
    """The tracker of the run in this folder; a run that resumes goes on in the same one.

    Args:
        kind: ``trackio`` and ``tensorboard`` write into the run's folder, without an account or a network; ``wandb``
            as the user's own settings of it say; ``auto`` is trackio where it is installed, else none.
        config: the resolved recipe, shown beside the curves.

    Raises:
        FedError: an unknown kind, a package that is not installed, or a tracker that does not start.
    """
    ready(kind)
    if kind == "auto":
        return _automatic(run, config)
    if kind == "none":
        return Untracked()
    run.mkdir(parents=True, exist_ok=True)
    return OPENERS[kind](run, config)


def ready(kind: str) -> None:
    """Raises FedError where there is no such tracker, or its package is not installed."""
    if kind not in get_args(Kind):
        raise _error(f"There is no tracker called {kind!r}. Set tracking to one of: {', '.join(get_args(Kind))}.")
    if kind in INSTALL and find_spec(kind) is None:
        raise _error(f"Tracking with {kind} needs a package that is not installed. Run: {INSTALL[kind]}")


def _automatic(run: Path, config: Config) -> Tracker:
    from fedllm.errors import FedError

    if find_spec("trackio") is None:
        return Untracked()
    try:
        return open_tracker("trackio", run, config)
    except FedError as error:
        log.warning("%s The run goes on without it.", error)
        return Untracked()


def _error(message: str) -> Exception:
    from fedllm.errors import FedError  # it imports torch, which the process that writes for trackio can do without

    return FedError(message)


def flat(record: Mapping[str, Any]) -> dict[str, float]:
    """A round's record as one level of numbers: a lane ``clients/ID/...`` for each client, the rest by its path."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if key == "round":
            continue
        if key in LANES and isinstance(value, Mapping):
            value = {"clients": {id: {LANES[key]: number} for id, number in value.items()}}
            found.update(_numbers("", value))
        elif key == "refused" and isinstance(value, Mapping):
            found["refused"] = float(len(value))
        else:
            found.update(_numbers(key, value))
    return found


def _numbers(path: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(f"{path}/{key}" if path else str(key), inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)


class Untracked:
    """No tracker: the run's own ``rounds.jsonl`` and ``report.md`` hold everything."""

    hint = ""

    def log(self, record: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class Trackio:
    """Trackio in a process of its own, fed one JSON line a round.

    Trackio takes its folder from the environment when it is imported, once per process, looks up the account behind any
    token it finds, and prints. A process of its own gives every run a folder, no token, no network and its own output.
    """

    def __init__(self, run: Path, config: Config) -> None:
        folder = Path(os.environ.get("TRACKIO_DIR") or run / "trackio").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        self.hint = f'TRACKIO_DIR="{folder}" trackio show --project {PROJECT}'
        diary = folder / "writer.log"
        with diary.open("w") as errors:
            self._writer = subprocess.Popen(
                [sys.executable, "-P", __file__, run.resolve().name],  # -P: this folder's modules shadow nothing
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=_alone(folder),
                start_new_session=True,  # a Ctrl-C is for the run, which then closes the pipe
            )
        self._send({"config": config})
        if self._receive() != "ready":
            self.close()
            raise _error(
                f"trackio did not start; {diary} has its words. Mend that, or set tracking to tensorboard or none."
            )

    def log(self, record: Mapping[str, Any]) -> None:
        self._send({"round": record.get("round"), "numbers": flat(record)})

    def close(self) -> None:
        pipe = _open(self._writer.stdin)
        if pipe.closed:
            return
        with suppress(OSError):  # the other end may be gone
            pipe.write(END + "\n")  # closing is not enough where a forked data loader still holds the pipe
            pipe.flush()
        with suppress(OSError):
            pipe.close()
        try:
            self._writer.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            log.warning(
                "trackio took more than %d s to finish and was ended; its last rounds may be missing.", PATIENCE
            )
            self._writer.kill()
            self._writer.wait()
        _open(self._writer.stdout).close()

    def _send(self, message: Mapping[str, Any]) -> None:
        pipe = _open(self._writer.stdin)
        if pipe.closed:
            return
        try:
            pipe.write(json.dumps(message, default=str) + "\n")
            pipe.flush()
        except OSError as error:
            log.warning("Tracking stopped: the process that writes for trackio is gone (%s). The run goes on.", error)
            self.close()

    def _receive(self) -> str:
        return _open(self._writer.stdout).readline().strip()


def _open(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None, "Popen was asked for this pipe"
    return pipe


def _alone(folder: Path) -> dict[str, str]:
    """This environment without what would take trackio off this machine."""
    kept = {key: value for key, value in os.environ.items() if key not in AWAY}
    return kept | {
        "TRACKIO_DIR": str(folder),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONIOENCODING": "utf-8",
    }


def write_for_trackio(name: str, lines: IO[str], answers: IO[str]) -> None:
    """The other process: one message a line, until the run says so or dies, which closes the pipe."""
    trackio = importlib.import_module("trackio")
    config = json.loads(next(lines))["config"]
    run = trackio.init(
        PROJECT, name=name, config=config, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
    )
    answers.write("ready\n")
    answers.flush()
    for line in lines:
        if line.strip() == END:
            break
        message = json.loads(line)
        run.log(message["numbers"], step=message["round"])
    run.finish()


class Tensorboard:
    """TensorBoard event files in the run's folder."""

    def __init__(self, run: Path, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run / "tensorboard"
        self.hint = f'tensorboard --logdir "{folder}"'
        self._writer = SummaryWriter(str(folder))
        self._writer.add_text("recipe", f"```json\n{json.dumps(config, indent=2, default=str)}\n```")

    def log(self, record: Mapping[str, Any]) -> None:
        for name, value in flat(record).items():
            self._writer.add_scalar(name, value, record.get("round"))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases, as the user's own settings of it say (account, offline mode, team)."""

    def __init__(self, run: Path, config: Config) -> None:
        wandb = importlib.import_module("wandb")
        name = run.resolve().name
        self._run = wandb.init(
            project=PROJECT,
            name=name,
            id=re.sub(r"[^A-Za-z0-9_-]", "-", name),
            resume="allow",
            dir=str(run),
            config=dict(config),
        )
        self.hint = str(self._run.url or f"wandb sync {self._run.dir}")

    def log(self, record: Mapping[str, Any]) -> None:
        self._run.log(flat(record), step=record.get("round"))

    def close(self) -> None:
        self._run.finish()


OPENERS: dict[str, Callable[[Path, Config], Tracker]] = {"trackio": Trackio, "tensorboard": Tensorboard, "wandb": Wandb}

if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # trackio prints; the pipe is for answers
    write_for_trackio(sys.argv[1], sys.stdin, answers)
