"""All that fedllm uses of flwr, its unpublished names included: no other module imports it.

The servers are stock ``flower-superlink`` and ``flower-supernode`` with ``--isolation process``: they start nothing,
and whoever holds the secret takes the tasks. A run's bundle is empty, and what another bundle brings is never run.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message

from fedllm.errors import FedError

POLL = 0.3
"""Seconds between two looks for a task or for replies."""

TTL = 7 * 86400.0
"""Seconds that a message may take; Flower's default of 12 hours is shorter than some trainings."""

FOREIGN, STOPPED, NODE_GONE, LOST = 7, 8, 5, 3
"""Flower's error codes: a bundle that is not ours; the executor went silent; the node went silent; a reply cut off."""

AGAIN = {NODE_GONE, STOPPED, LOST}
"""Errors after which the same job may be pushed again: the node trains it once and keeps its reply."""

OFFLINE = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""Keeps Flower's programs from calling home."""

_BUNDLE = {
    "pyproject.toml": b"""[project]
name = "fedllm-run"
version = "1.0.0"
description = "No code: each node runs its own fedllm."
license = "Apache-2.0"
[tool.flwr.app]
publisher = "fedllm"
[tool.flwr.app.components]
serverapp = "fedllm_run.none:app"
clientapp = "fedllm_run.none:app"
[tool.flwr.app.config]
""",
    "fedllm_run/__init__.py": b"",
    "fedllm_run/none.py": b"app = None\n",
}


class Gone(Exception):
    """The other side does not know this task any more: take the next one."""


class Refused(FedError):
    """The SuperLink did not take what was asked of it."""


@dataclass(frozen=True)
class Link:
    """An address of Flower's, and the certificate authority that vouches for it; none on plain HTTP."""

    address: str
    ca: bytes | None = None

    @property
    def where(self) -> tuple[str, bool, bytes | None]:
        """The address as flwr's clients take it."""
        return self.address, self.ca is None, self.ca


@cache
def bundle() -> Fab:
    """The empty bundle of every run; its hash is a constant of the flwr version."""
    content, _ = build_fab_from_files(_BUNDLE)
    return Fab(hashlib.sha256(content).hexdigest(), content, {})


def environment(home: Path) -> dict[str, str]:
    """The variables under which Flower's programs run: nothing of theirs outside ``home``, no call home."""
    return {**os.environ, **OFFLINE, "FLWR_HOME": str(home)}


def program(name: str) -> str:
    """The path of one of Flower's commands in this environment."""
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.is_file():
        raise FedError(f"{name} is not installed beside this Python: install the extra `flower` again.")
    return str(path)


def superlink_command(port: int, database: Path, secret: Path, tls: Mapping[str, Path] | None) -> list[str]:
    """The stock SuperLink, on loopback. ``tls`` has the paths ``ca``, ``certificate``, ``key``; None is plain HTTP."""
    security = (
        ["--insecure"]
        if tls is None
        else [
            *("--ssl-ca-certfile", str(tls["ca"]), "--ssl-certfile", str(tls["certificate"])),
            *("--ssl-keyfile", str(tls["key"]), "--enable-supernode-auth"),
        ]
    )
    return [
        *(program("flower-superlink"), "--host", "127.0.0.1", "--port", str(port), "--isolation", "process"),
        *("--superexec-auth-secret-file", str(secret), "--database", str(database)),
        *("--disable-runtime-dependency-installation", *security),
    ]


def supernode_command(superlink: str, port: int, secret: Path, ca: Path | None, key: Path | None) -> list[str]:
    """The stock SuperNode, whose own API listens on loopback; without ``ca`` it talks plain HTTP and has no key."""
    security = (
        ["--insecure"] if ca is None else ["--root-certificates", str(ca), "--auth-supernode-private-key", str(key)]
    )
    return [
        *(program("flower-supernode"), "--superlink", superlink, "--host", "127.0.0.1", "--port", str(port)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret), *security),
    ]


class Retry:
    """Repeats a request while the other side is away.

    Flower's own helper answers a 401 with SIGINT to its process and never gives up.

    Args:
        stopped: asked between tries.
        seconds: after which it gives up; None for never.
    """

    def __init__(self, stopped: Callable[[], bool] = lambda: False, seconds: float | None = None) -> None:
        self._stopped, self._seconds = stopped, seconds
        self.max_tries = None

    def invoke(self, send: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls ``send`` until it answers."""
        started, pause = time.monotonic(), 0.2
        while True:
            try:
                return send(*args, **kwargs)
            except httpx.HTTPStatusError as error:
                code = error.response.status_code
                if code in (401, 403):
                    raise Gone(f"HTTP {code}") from error
                if code not in (429, 502, 503, 504):
                    raise
                failed: Exception = error
            except httpx.TransportError as error:
                failed = error
            if self._stopped() or (self._seconds is not None and time.monotonic() - started > self._seconds):
                raise failed
            time.sleep(pause)
            pause = min(2 * pause, 5.0)


def record(note: Mapping[str, Any], payload: bytes = b"") -> RecordDict:
    """A note and bytes as the content of a message; the bytes travel in chunks, as an array's do."""
    content = RecordDict({"note": ConfigRecord({"v": 1, "json": json.dumps(note)})})
    if payload:
        content["payload"] = ArrayRecord({"bytes": Array("uint8", (len(payload),), "fedllm.payload", payload)})
    return content


def read(content: RecordDict, most: int) -> tuple[dict[str, Any], bytes]:
    """The note and the bytes of ``record``.

    Raises:
        ValueError: it is no such message, or longer than ``most`` bytes.
    """
    try:
        text = content.config_records["note"]["json"]
        payload = content.array_records["payload"]["bytes"].data if "payload" in content else b""
    except KeyError as error:
        raise ValueError("it is no message of fedllm's") from error
    if not isinstance(text, str) or not isinstance(payload, bytes):
        raise ValueError("it is no message of fedllm's")
    if len(text) + len(payload) > most:
        raise ValueError(f"it has {len(text) + len(payload)} bytes, and {most} are the most")
    note = json.loads(text)
    if not isinstance(note, dict):
        raise ValueError("its note is no object")
    return note, payload


def _runtime(link: Link, interceptors: Sequence[Any], retry: Retry) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(*link.where, interceptors, retry_invoker=retry)  # type: ignore[arg-type]


def _acquirer(link: Link, secret: bytes, retry: Retry) -> RuntimeHttpClient:
    signed = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={"/flwr.proto.Runtime/AcquireTask"})
    return _runtime(link, [RuntimeVersionHttpInterceptor(component_name="SuperExec"), signed], retry)


def _taken(link: Link, token: str, component: str, retry: Retry) -> RuntimeHttpClient:
    return _runtime(
        link, [RuntimeVersionHttpInterceptor(component_name=component), RuntimeTokenHttpInterceptor(token)], retry
    )


class Heartbeat:
    """Tells the other side from a thread that this task is alive, for as long as the context lasts."""

    def __init__(self, client: RuntimeHttpClient) -> None:
        self._client, self.lost = client, threading.Event()
        self._sender = HeartbeatSender(self._beat)

    def _beat(self) -> bool:
        try:
            return bool(self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success) or self._gone()
        except Gone:
            return self._gone()
        except httpx.HTTPError:
            return False

    def _gone(self) -> bool:
        self.lost.set()
        return True

    def __enter__(self) -> Heartbeat:
        self._sender.start()
        return self

    def __exit__(self, *ended: object) -> None:
        if self._sender.is_running:
            self._sender.stop()


@dataclass(frozen=True)
class Node:
    """A node as the SuperLink knows it. ``activated`` is when it last came, in seconds since the epoch."""

    id: int
    name: str
    key: bytes
    online: bool
    activated: float


@dataclass(frozen=True)
class Answer:
    """A reply to one message: its content, or the error that Flower gives in its place."""

    content: RecordDict | None
    code: int = 0
    reason: str = ""


class Control:
    """The SuperLink's administration, which asks nobody for a credential: on loopback only, behind the gate."""

    def __init__(self, link: Link, seconds: float = 60.0) -> None:
        self._client = ControlHttpClient.from_server_address(*link.where, [], retry_invoker=Retry(seconds=seconds))  # type: ignore[arg-type]

    def registered(self) -> dict[bytes, int]:
        """The public keys that may connect, with their nodes' ids."""
        nodes = self._client.ListNodes(ListNodesRequest()).nodes_info
        return {node.public_key: node.node_id for node in nodes if node.status != "unregistered"}

    def register(self, key: bytes, name: str) -> None:
        self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))

    def unregister(self, node: int) -> None:
        self._client.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def start_run(self) -> int:
        """A new run of the empty bundle; its id."""
        return int(self._client.StartRun(StartRunRequest(fab=fab_to_proto(bundle()))).run_id)

    def stop_run(self, run: int) -> None:
        with suppress(Exception):  # it may have ended by itself
            self._client.StopRun(StopRunRequest(run_id=run))

    def close(self) -> None:
        self._client.close()


class Grid:
    """The server's end of a run: pushes messages to nodes, and pulls what they answer."""

    def __init__(self, link: Link, secret: bytes, stopped: Callable[[], bool] = lambda: False) -> None:
        self._link, self._secret, self._stopped = link, secret, stopped

    def __enter__(self) -> Grid:
        control = Control(self._link)
        try:
            self.run = control.start_run()
        finally:
            control.close()
        self._grid = HttpGrid(*self._link.where, token=self._token())
        self._grid._retry_invoker = Retry(self._stopped)  # type: ignore[assignment]
        self._client = self._grid._runtime_client
        self._heartbeat = Heartbeat(self._client)
        self._heartbeat.__enter__()
        task = self._client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
        TaskIdentity.node_id = task.context.node_id
        self._grid.set_run(run_from_proto(task.run))
        return self

    def _token(self) -> str:
        """Takes the task of this run; those of others are ended, else they come back to the queue for ever."""
        waiting = _acquirer(self._link, self._secret, Retry(self._stopped, 60.0))
        try:
            for _ in range(int(60 / POLL)):
                found = waiting.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
                if found.HasField("task") and found.token:
                    if found.task.run_id == self.run:
                        return str(found.token)
                    other = _taken(self._link, found.token, "flwr-serverapp", Retry(seconds=5.0))
                    with suppress(Exception):
                        other.PushTaskOutput(PushTaskOutputRequest(sub_status="failed", details="not this server's"))
                    other.close()
                time.sleep(POLL)
        finally:
            waiting.close()
        raise FedError("the SuperLink has not handed out this run's task in a minute: see its log.")

    def __exit__(self, kind: object, error: object, at: object) -> None:
        with suppress(Exception):  # the run's end is a courtesy: the SuperLink notices it by itself
            self._client.PushTaskOutput(
                PushTaskOutputRequest(sub_status="failed" if error else "completed", details="")
            )
        self._stopped = lambda: True
        self._heartbeat.__exit__()
        self._grid.close()

    @property
    def lost(self) -> bool:
        """Whether the SuperLink has ended this run."""
        return self._heartbeat.lost.is_set()

    def nodes(self) -> dict[int, Node]:
        """The nodes that are connected now."""
        return {
            node.node_id: Node(
                node.node_id,
                node.name,
                node.public_key,
                node.status == "online",
                datetime.fromisoformat(node.last_activated_at).timestamp() if node.last_activated_at else 0.0,
            )
            for node in self._grid.get_nodes()
        }

    def push(self, node: int, note: Mapping[str, Any], payload: bytes = b"", group: str = "") -> str:
        """Sends one message; its id. None of it is kept here: five copies of a payload are in memory meanwhile."""
        (id,) = self._grid.push_messages([Message(record(note, payload), node, "train", group_id=group, ttl=TTL)])
        if not id:
            raise Refused(f"the SuperLink did not take a message for node {node}.")
        return str(id)

    def pull(self, ids: Sequence[str]) -> Iterator[tuple[str, Answer]]:
        """The answers that have come to these messages, one at a time."""
        for id in ids:
            for message in self._grid.pull_messages([id]):
                to = message.metadata.reply_to_message_id
                if message.has_error():
                    yield to, Answer(None, message.error.code, str(message.error.reason))
                else:
                    yield to, Answer(message.content)


@dataclass(frozen=True)
class Task:
    """One message that came to this node, to be answered once.

    Args:
        content: what the server sent; None where the run's bundle is not the empty one.
        bundle: the hash of that bundle.
    """

    content: RecordDict | None
    bundle: str
    lost: threading.Event
    _reply: Callable[[RecordDict | Error], None]

    def answer(self, note: Mapping[str, Any], payload: bytes = b"") -> None:
        self._reply(record(note, payload))

    def refuse_bundle(self) -> None:
        self._reply(Error(FOREIGN, f"this node runs no code from a server (bundle {self.bundle[:12]})"))


def tasks(link: Link, secret: bytes, stopped: Callable[[], bool] = lambda: False) -> Iterator[Task | None]:
    """The messages that come to the SuperNode at ``link``, as they come; None while there is none.

    A task whose session has ended on the other side is dropped: the server pushes its job again.
    """
    waiting = _acquirer(link, secret, Retry(stopped))
    while not stopped():
        try:
            found = waiting.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
        except httpx.HTTPError:
            found = None
        if found is None or not found.HasField("task") or not found.token:
            yield None
            time.sleep(POLL)
            continue
        client = _taken(link, found.token, "flwr-clientapp", Retry(stopped, 600.0))
        try:
            with Heartbeat(client) as heartbeat:
                yield _task(client, heartbeat)
        except (Gone, httpx.HTTPError) as error:
            print(f"fedllm: a task was lost on the way ({type(error).__name__}).", flush=True)
        finally:
            client.close()
    waiting.close()


def _task(client: RuntimeHttpClient, heartbeat: Heartbeat) -> Task:
    message, context, _, fab = pull_task_input(client)

    def reply(content: RecordDict | Error) -> None:
        push_message(client, Message(content, reply_to=message), context)
        client.PushTaskOutput(PushTaskOutputRequest(sub_status="completed", details=""))

    ours = fab.hash_str == bundle().hash_str and hashlib.sha256(fab.content).hexdigest() == fab.hash_str
    return Task(message.content if ours else None, fab.hash_str, heartbeat.lost, reply)
