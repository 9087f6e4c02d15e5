"""A federation of real programs on loopback, for tests: folders of a server and its nodes, and their processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedllm.fleets.flower.gate import free_port

FEDLLM = [sys.executable, "-m", "fedllm.cli"]
ROOT = Path(__file__).parents[1]


def command(*words: str, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """One command to its end."""
    return subprocess.run(
        [*FEDLLM, *words], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@dataclass
class Lab:
    """One server and its nodes under ``folder``.

    Args:
        folder: theirs alone.
        policy: what every node's policy has beside its client and server.
    """

    folder: Path
    policy: dict[str, Any]
    port: int = field(default_factory=free_port)
    running: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from fedllm.commands.serve import init

        init(self.folder / "deploy", "127.0.0.1", self.port, insecure=False)

    @property
    def deploy(self) -> Path:
        return self.folder / "deploy"

    def node(self, client: str, allowed: bool = True, **policy: Any) -> Path:
        """A node's folder with its policy, known to the server."""
        from fedllm.commands.join import init
        from fedllm.commands.serve import allow

        site, server = self.folder / client, f"127.0.0.1:{self.port}"
        init(site, client, server, insecure=False)
        page = {"client": client, "server": server, "ask": "always", **self.policy, **policy}
        (site / "policy.yaml").write_text(yaml.safe_dump(page))
        (site / "ca.crt").write_bytes((self.deploy / "ca.crt").read_bytes())
        if allowed:
            allow(self.deploy, client, site / "node.pub", None, None)
        return site

    def start(self, name: str, *words: str) -> subprocess.Popen[str]:
        """A command in a process group of its own; its output goes to ``NAME.out``."""
        with (self.folder / f"{name}.out").open("a") as out:
            self.running[name] = subprocess.Popen(
                [*FEDLLM, *words], cwd=self.folder, env=environment(), stdout=out, stderr=out, text=True,
                start_new_session=True,
            )  # fmt: skip
        return self.running[name]

    def join(self, client: str) -> subprocess.Popen[str]:
        return self.start(client, "join", client)

    def serve(self, *words: str) -> subprocess.Popen[str]:
        return self.start("server", "serve", "deploy", *words)

    def said(self, name: str) -> str:
        path = self.folder / f"{name}.out"
        return path.read_text() if path.is_file() else ""

    def until(self, name: str, words: str, seconds: float = 240) -> None:
        """Waits until a process has said these words."""
        end = time.monotonic() + seconds
        while words not in self.said(name):
            assert time.monotonic() < end, f"{name} has not said {words!r}:\n{self.said(name)[-3000:]}"
            time.sleep(0.1)

    def ended(self, name: str, seconds: float = 400) -> int:
        """The exit code of a process that ends by itself."""
        try:
            return self.running[name].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{name} has not ended:\n{self.said(name)[-3000:]}\n"
                + "\n".join(f"--- {other}: {self.said(other)[-800:]}" for other in self.running)
            ) from None

    def children(self, name: str) -> list[int]:
        """The processes that a program has started."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parent = int(path.read_text().rpartition(")")[2].split()[1])
                found += [int(path.parent.name)] if parent == self.running[name].pid else []
        return found

    def kill(self, name: str) -> None:
        """SIGKILL to a program and to what it has started."""
        for child in self.children(name):
            os.kill(child, signal.SIGKILL)
        process = self.running.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait(10)

    def close(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


def rehearsal(**data: Any) -> dict[str, Any]:
    """A policy for shares of a public corpus."""
    return {
        "rank": 64,
        "data": {"name": "word_problems", "deal": "recipe", **data},
        "models": ["pico"],
        "rules": ["fedhl", "flexlora", "flora", "zero_padding", "fedit", "fedloru", "pfedloru"],
    }


def simulated(folder: Path, arguments: Sequence[str]) -> None:
    """The same recipe in one process."""
    done = command("train", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr


def same_run(one: Path, other: Path) -> None:
    """Asserts that two runs ended in the same bits: adapter, state, and each client's update in every round."""

    def digests(run: Path) -> list[dict[str, str]]:
        lines = (run / "rounds.jsonl").read_text().splitlines()
        return [{id: c["digest"] for id, c in json.loads(line)["clients"].items()} for line in lines]

    assert digests(one) == digests(other)
    names = ["adapter/adapter_model.safetensors"]
    names += [f"checkpoint/{path.name}/state.safetensors" for path in (one / "checkpoint").glob("round_*")]
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
