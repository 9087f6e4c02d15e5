"""What a federation across machines costs on loopback: one payload there and back, and programs over many rounds.

python benchmarks/machines.py payload 67 200      seconds and peak memory of each program, MB there and back
python benchmarks/machines.py rounds 20           resident memory of the four programs, by round
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import yaml

FEDLLM = [sys.executable, "-m", "fedllm.cli"]


def status(pid: int, key: str) -> float:
    """``VmRSS`` or ``VmHWM`` of a process in MB."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for path in tasks for word in path.read_text().split()]


def payload(sizes: list[int]) -> None:
    """One message of so many MB to a node and the same bytes back, by stock programs, TLS, keys and the gate."""
    from fedllm.commands.serve import _superlink, allow, init
    from fedllm.fleets.flower import api, keys
    from fedllm.fleets.flower.children import Child
    from fedllm.fleets.flower.gate import free_port

    with tempfile.TemporaryDirectory() as name:
        folder, port, own = Path(name), free_port(), free_port()
        init(folder / "deploy", "127.0.0.1", port, False)
        keys.create_node(folder / "site", "a", "")
        allow(folder / "deploy", "a", folder / "site" / "node.pub", None, None)
        from contextlib import ExitStack

        with ExitStack() as stack:
            link, secret = _superlink(stack, folder / "deploy", keys.load_server(folder / "deploy"), print)
            site = folder / "site"
            command = api.supernode_command(
                f"127.0.0.1:{port}", own, site / "node.secret", folder / "deploy" / "ca.crt", site / "node"
            )
            node = stack.enter_context(Child(command, api.environment(site / "flower"), site / "log"))
            echo = stack.enter_context(
                subprocess.Popen([sys.executable, __file__, "echo", str(own), str(site / "node.secret")])
            )
            stack.callback(echo.terminate)
            grid = stack.enter_context(api.Grid(link, secret))
            while not (nodes := list(grid.nodes())):
                time.sleep(0.2)
            superlink = next(pid for pid in children(os.getpid()) if pid not in (node.pid, echo.pid))
            for megabytes in sizes:
                body = os.urandom(megabytes * 1_000_000)
                began, answers = time.monotonic(), []
                sent = grid.push(nodes[0], {"do": "echo"}, body)
                while not answers:
                    answers = list(grid.pull([sent]))
                    time.sleep(0.1)
                assert api.read(answers[0][1].content, 1 << 31)[1] == body
                took = time.monotonic() - began
                peaks = {
                    name: round(status(pid, "VmHWM"))
                    for name, pid in (
                        ("server and gate", os.getpid()), ("SuperLink", superlink), ("SuperNode", node.pid or 0),
                        ("node", echo.pid),
                    )
                }  # fmt: skip
                print(json.dumps({"MB": megabytes, "seconds": round(took, 1), "peak MB": peaks}), flush=True)


def echo(port: int, secret: Path) -> None:
    """Sends back what comes."""
    from fedllm.fleets.flower import api

    for task in api.tasks(api.Link(f"127.0.0.1:{port}"), secret.read_bytes()):
        if task is not None and task.content is not None:
            task.answer(*api.read(task.content, 1 << 31))


def rounds(count: int) -> None:
    """Two nodes and a server, a step a round; memory of server, SuperLink, SuperNode and node after each round."""
    from fedllm.commands.join import init as join_init
    from fedllm.commands.serve import allow, init
    from fedllm.fleets.flower.gate import free_port

    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        init(folder / "deploy", "127.0.0.1", port, False)
        running = []
        for client in ("c0", "c1"):
            site, server = folder / client, f"127.0.0.1:{port}"
            join_init(site, client, server, False)
            page = {"client": client, "server": server, "ask": "always", "rank": 64, "models": ["pico"]}
            page |= {"rules": ["fedhl"], "data": {"name": "word_problems", "deal": "recipe"}}
            (site / "policy.yaml").write_text(yaml.safe_dump(page))
            (site / "ca.crt").write_bytes((folder / "deploy" / "ca.crt").read_bytes())
            allow(folder / "deploy", client, site / "node.pub", None, None)
            running.append(subprocess.Popen([*FEDLLM, "join", client], cwd=folder, stdout=subprocess.DEVNULL))
        recipe = ["smoke", f"run.rounds={count}", "clients.rank=[8,2]", "worker.steps=1", "eval.base=false"]
        recipe += ["eval.generate=false", "run.threads=1", "worker.optimizer=kept", "run.output=run", "--rehearsal"]
        server_process = subprocess.Popen(
            [*FEDLLM, "serve", "deploy", *recipe], cwd=folder, stdout=subprocess.PIPE, text=True
        )
        watcher = threading.Timer(3000, server_process.kill)
        watcher.daemon = True
        watcher.start()
        assert server_process.stdout is not None
        began = time.monotonic()
        for line in server_process.stdout:
            if not line.startswith("round "):
                continue
            pids = {"server and gate": server_process.pid, "node": running[0].pid}
            pids |= {"SuperLink": children(server_process.pid)[0], "SuperNode": children(running[0].pid)[0]}
            told = {name: round(status(pid, "VmRSS")) for name, pid in pids.items()}
            print(
                json.dumps({"round": line.split()[1], "seconds": round(time.monotonic() - began, 1), **told}),
                flush=True,
            )
        kept = {name: len(list((folder / "c0" / name).iterdir())) for name in ("replies", "memory")}
        print(json.dumps({"kept on a node": kept, "exit": server_process.wait()}))
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait(60)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "payload":
        payload([int(word) for word in rest])
    elif what == "echo":
        echo(int(rest[0]), Path(rest[1]))
    else:
        rounds(int(rest[0]))
