"""Runs programs that a language model wrote, against tests, where they can do no harm and cannot pass by cheating.

A program is hostile: it may bomb, loop, read your keys, open a socket, or patch whatever checks it. It runs in
namespaces of its own (`jail.py` says how), and the tests run in another process that it cannot reach: they call its
function over a pipe, with plain data. Only the standard library can be imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from fedllm.errors import FedError


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Args:
        wall_seconds: of the clock, for the program with all its tests.
        cpu_seconds: of each process.
        memory_bytes: address space of each process.
        file_bytes: of the private directory, and of each file.
        processes: and threads, at once.
        open_files: at once.
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 8
    memory_bytes: int = 512 << 20
    file_bytes: int = 4 << 20
    processes: int = 8
    open_files: int = 32

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise FedError(f"{name}={value}: a limit is more than 0.")


@dataclass(frozen=True)
class Program:
    """A program and its tests.

    Args:
        source: the whole program; nothing in it is trusted.
        entry_point: the function that is tested.
        test: trusted source that defines ``check(candidate)``, which raises where the candidate is wrong.
        prompt: trusted source that the tests may take helpers from.
    """

    source: str
    entry_point: str
    test: str
    prompt: str = ""


@dataclass(frozen=True)
class Verdict:
    """``passed``, ``failed: why`` or ``timed out``."""

    outcome: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


class _Missing(Exception):
    """``(guarantee, reason)``: the platform does not give it."""


def run(program: Program, limits: Limits, accepted: Sequence[str] = ()) -> Verdict:
    """One program against its tests; nothing of it is left running.

    Args:
        accepted: guarantees of `fedllm.sandbox.jail.GUARANTEES` to do without where the platform does not give them.

    Raises:
        FedError: a guarantee is missing that is not accepted.
    """
    try:
        return _run(program, limits, tuple(accepted))
    except _Missing as missing:
        raise FedError(_refusal({missing.args[0]: missing.args[1]})) from None


def run_all(
    programs: Sequence[Program], limits: Limits, accepted: Sequence[str] = (), workers: int | None = None
) -> list[Verdict]:
    """`run` for each, ``workers`` at a time (by default as many as there are cores), in the order given."""
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda program: run(program, limits, accepted), programs))


def require(accepted: Sequence[str] = ()) -> dict[str, str]:
    """Tries the jail out. The guarantees that are missing here and accepted, with the reasons.

    Raises:
        FedError: an unknown name, or a guarantee is missing that is not accepted; says which.
    """
    known = _guarantees()
    for name in accepted:
        if name not in known:
            from fedllm.config.suggest import nearest

            raise FedError(f"accept_missing={name}: {nearest(name, known, 'guarantee')}")
    missing = missing_guarantees()
    refused = {name: why for name, why in missing.items() if name not in accepted}
    if refused:
        raise FedError(_refusal(refused))
    return missing


@cache
def missing_guarantees() -> dict[str, str]:
    """What this platform does not give: the guarantee's name, and why."""
    probe = Program("def one():\n    return 1", "one", "def check(candidate):\n    assert candidate() == 1")
    missing: dict[str, str] = {}
    while True:
        try:
            verdict = _run(probe, Limits(wall_seconds=60.0), tuple(missing))
        except _Missing as found:
            name, why = found.args
            if name in missing:
                raise FedError(f"The sandbox does not run here: {name}: {why}.") from None
            missing[name] = why
            continue
        if not verdict.passed:
            raise FedError(f"The sandbox does not run here: a program that returns 1 {verdict.outcome}.")
        return missing


def _guarantees() -> dict[str, str]:
    from fedllm.sandbox.jail import GUARANTEES

    return GUARANTEES


def _refusal(missing: dict[str, str]) -> str:
    parts = "; ".join(
        f"{name} ({why}): {_guarantees().get(name, 'the sandbox broke')}" for name, why in missing.items()
    )
    return (
        f"Programs are not run, because this platform does not isolate them. Missing: {parts}. Evaluate where user "
        f"namespaces are allowed, or accept the risk with accept_missing=[{','.join(missing)}]."
    )


def _run(program: Program, limits: Limits, accepted: tuple[str, ...]) -> Verdict:
    if os.name != "posix":
        raise FedError("Programs are not run: the sandbox needs Linux, whose namespaces keep them in.")
    settings = json.dumps({"limits": asdict(limits), "accepted": list(accepted)})
    job = {
        "program": program.source,
        "entry_point": program.entry_point,
        "test": program.test,
        "prompt": program.prompt,
    }
    body = json.dumps(job).encode()
    command = [sys.executable, "-I", "-S", "-B", str(Path(__file__).with_name("jail.py")), settings]
    try:
        done = subprocess.run(
            command,
            input=len(body).to_bytes(4, "big") + body,
            capture_output=True,
            timeout=limits.wall_seconds + 30.0,
            env={"LANG": "C.UTF-8"},
            cwd="/",
        )
    except subprocess.TimeoutExpired as error:
        raise FedError(
            "The sandbox's supervisor hangs: this is a bug, and the program's verdict is not known."
        ) from error
    for line in done.stderr.decode(errors="replace").splitlines():
        if line.startswith("["):
            raise _Missing(*json.loads(line))
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise FedError(f"The sandbox's supervisor ended with {done.returncode}: {said[-1] if said else 'no message'}")
    return Verdict(**json.loads(done.stdout))
