"""The fleet of clients on other machines: jobs become messages, and their answers replies, in the order of the jobs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedllm.core import (
    Algorithm,
    Client,
    ClientResult,
    ClientWorker,
    Display,
    Failed,
    Job,
    Reply,
    Round,
    Score,
    StopAsked,
    Tensors,
    Worker,
)
from fedllm.errors import FedError
from fedllm.fleets.flower import api, notes
from fedllm.fleets.flower.keys import Member, clients_by_key
from fedllm.fleets.flower.store import Store
from fedllm.wire.messages import pack, unpack
from fedllm.wire.serialization import canonical, size

PUSHES = 20
"""How often one job is pushed before its client counts as failed."""

ROOM = 1 << 20
"""Bytes that a reply may have beyond twice its expected size: names, notes, a counter."""

BROKEN = (ValueError, KeyError, TypeError, AttributeError, RecursionError, UnicodeError, SafetensorError)
"""What reading a reply that is none can raise."""


@dataclass(frozen=True)
class Declared:
    """A client as its node declared it.

    Args:
        client: its id, rows and rank.
        steps: optimizer steps it takes in a round.
        node: the SuperLink's number of its node.
        scores: whether its policy lets it score the served update.
    """

    client: Client
    steps: int
    node: int
    scores: bool = False


@dataclass
class Roll:
    """Who is there: says hello to every node that comes, and keeps which client it stands for.

    Args:
        grid: the run's.
        members: who may take part; keys decide who is who. Without any key the ids are believed (plain HTTP, loopback).
        page: the recipe's.
        say: tells the operator.
        status: the file that ``fedllm serve status`` reads; None writes none.
    """

    grid: api.Grid
    members: Mapping[str, Member]
    page: Mapping[str, Any]
    say: Callable[[str], None]
    status: Path | None = None
    declared: dict[str, Declared] = field(default_factory=dict)
    online: dict[int, api.Node] = field(default_factory=dict)
    retries: int = 0
    wire_bytes: dict[str, int] = field(default_factory=lambda: {"down": 0, "up": 0})
    training: dict[str, int] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)
    versions: dict[str, Mapping[str, str]] = field(default_factory=dict)
    _written: float = 0.0
    _asked: dict[str, int] = field(default_factory=dict)
    _greeted: dict[int, float] = field(default_factory=dict)
    _again: dict[int, float] = field(default_factory=dict)

    def look(self) -> None:
        """Says hello to nodes that came since the last look, and reads what they answered."""
        before, self.online = self.online, self.grid.nodes()
        for id, node in self.online.items():
            if id not in before:
                self.say(f"node {self.owner(node) or id} is here")
            waits = self._again.get(id)
            if self._greeted.get(id) != node.activated or (waits is not None and time.monotonic() >= waits):
                self._again.pop(id, None)
                self._greeted[id] = node.activated
                if id in self._asked.values():
                    continue
                note = {"do": "hello", "recipe": notes.public_page(self.page), "versions": notes.versions()}
                self._asked[self.grid.push(id, note)] = id
        for id in before.keys() - self.online.keys():
            self.say(f"node {self.owner(before[id]) or id} is away")
        for message, answer in self.grid.pull(list(self._asked)):
            asked = self._asked.pop(message)
            try:
                self._read(asked, answer)
            except BROKEN as error:
                self.say(f"node {asked} answered hello with what is no answer: {notes.reason(error)}")

        self._tell_status()

    def _tell_status(self) -> None:
        """Writes who is there, once a second at most."""
        now = time.time()
        for id, known in self.declared.items():
            if known.node in self.online:
                self.seen[id] = now
        if self.status is None or now - self._written < 1.0:
            return
        self._written = now
        clients = {
            id: {
                "online": id in self.declared and self.declared[id].node in self.online,
                "seen": self.seen.get(id),
                "round": self.training.get(id),
                "rows": self.declared[id].client.num_samples if id in self.declared else None,
                "rank": self.declared[id].client.rank if id in self.declared else None,
            }
            for id in self.members
        }
        told = {"at": now, "clients": clients, "sent_again": self.retries, "payload_bytes": self.wire_bytes}
        scratch = self.status.with_name(f".{self.status.name}.writing")
        scratch.write_text(json.dumps(told))
        scratch.replace(self.status)

    def notes(self) -> list[str]:
        """What the report says of the nodes."""
        others = sorted({f"{name} {v}" for told in self.versions.values() for name, v in told.items()})
        return [
            f"Across machines: {len(self.declared)} clients on Flower ({', '.join(list(self.declared)[:20])}), with "
            f"{', '.join(others)}.",
            f"Messages carried {self.wire_bytes['down']:,} bytes of payload to clients and {self.wire_bytes['up']:,} "
            f"back; {self.retries} jobs were sent again.",
        ]

    def owner(self, node: api.Node) -> str:
        """The client that a node's key belongs to; empty where nodes have no keys."""
        return clients_by_key(self.members).get(node.key, "")

    def _read(self, node: int, answer: api.Answer) -> None:
        if answer.content is None:
            self._again[node] = time.monotonic() + 2.0  # it was restarted while it answered
            return
        note, _ = api.read(answer.content, notes.NOTE_BYTES)
        owner = self.owner(self.online[node]) if node in self.online else ""
        if "client" not in note:
            why = notes.reason(note.get("refused", note.get("failed", "no reason given")))
            self.say(f"node {owner or node} does not take part: {why}")
            self._again[node] = time.monotonic() + 15.0  # its owner may approve, or change the policy
            return
        client = notes.read_client(note["client"])
        wrong = self._misfit(client, owner) or notes.version_sentence(notes.versions(), note.get("versions") or {})[0]
        if wrong:
            self.say(f"node {owner or node} is not let in: {wrong}")
            return
        steps = note.get("steps")
        if type(steps) is not int or not 0 < steps < 2**31:
            raise ValueError("its steps are no number")
        told = note.get("versions") or {}
        self.versions[client.id] = {name: notes.reason(told.get(name, ""))[:20] for name in notes.versions()}
        self.declared[client.id] = Declared(client, steps, node, note.get("score") is True)
        self.say(f"client {client.id} is ready: {client.num_samples} rows, rank {client.rank}, {steps} steps a round")

    def _misfit(self, client: Client, owner: str) -> str:
        """Why this client is not let in, in words."""
        member = self.members.get(client.id)
        if member is None:
            return f"it says that it is {notes.reason(client.id)}, which is no client of this server"
        if member.key and owner != client.id:
            return f"it says that it is {client.id}, and its key is {owner or 'nobody'}'s"
        known = self.declared.get(client.id)
        if known is not None and known.client != client:
            return f"it was {known.client} in this run, and is {client} now"
        if known is not None and not member.key and known.node != client and known.node in self.online:
            return f"client {client.id} is there already"
        if member.most_rows is not None and client.num_samples > member.most_rows:
            return f"it claims {client.num_samples} rows, and most_rows is {member.most_rows}"
        if member.most_rank is not None and client.rank > member.most_rank:
            return f"it claims rank {client.rank}, and most_rank is {member.most_rank}"
        return ""


@dataclass
class _Wait:
    """One job of a round: the message that it waits for, and when that was pushed."""

    key: str
    message: str = ""
    pushed: float = 0.0
    pushes: int = 0
    node: int = 0


@dataclass(frozen=True)
class Flower:
    """The fleet.

    Args:
        roll: who is there.
        run: our name of the run, the same when it is resumed.
        store: replies of this run that were received: a server that died trains nothing again.
        display: shows clients as they answer.
        stop: whether somebody asked the run to end.
        deadline: seconds of the server's clock after which a client has failed; None waits for ever.
    """

    roll: Roll
    run_id: str
    store: Store
    display: Display
    stop: Callable[[], bool] = lambda: False
    deadline: float | None = None

    def run(self, algorithm: Algorithm, worker: Worker, jobs: Sequence[Job], rnd: Round) -> Iterator[ClientResult]:
        recipe, began = notes.recipe_digest(self.roll.page), time.time()
        waits = [
            _Wait(notes.job_key(recipe, self.run_id, rnd, j.client.id, j.sent, notes.of_memory(j.memory))) for j in jobs
        ]
        finished: dict[int, ClientResult] = {}
        for place, wait in enumerate(waits):
            if (kept := self.store.get(wait.key)) is not None:
                finished[place] = self._read(jobs[place], kept, algorithm)
        shown: set[int] = set()
        for place in range(len(jobs)):
            while place not in finished:
                if self.stop():
                    raise StopAsked
                if self.roll.grid.lost:
                    raise FedError("the SuperLink has ended this run: run.resume=true goes on from what is kept.")
                self._push(jobs, waits, finished, rnd, recipe)
                self._pull(jobs, waits, finished, algorithm)
                self._watch(jobs, waits, finished, time.time() - began)
                for done in finished.keys() - shown:
                    shown.add(done)
                    self.display.client(jobs[done].client.id)
                if place not in finished:
                    time.sleep(api.POLL)
            yield finished[place]

    def _push(
        self,
        jobs: Sequence[Job],
        waits: Sequence[_Wait],
        finished: dict[int, ClientResult],
        rnd: Round,
        recipe: str,
    ) -> None:
        """Pushes the jobs that wait for no message and whose node is there."""
        for place, (job, wait) in enumerate(zip(jobs, waits, strict=True)):
            declared = self.roll.declared.get(job.client.id)
            if place in finished or wait.message or declared is None or declared.node not in self.roll.online:
                continue
            if wait.pushes >= PUSHES:
                finished[place] = ClientResult(Failed(job.client, f"its node was lost {PUSHES} times"), job.memory)
                continue
            note = {
                "do": "train",
                "key": wait.key,
                "recipe": recipe,
                "round": vars(rnd),
                "memory": notes.of_memory(job.memory),
            }
            body = pack({}, {"sent": job.sent})
            wait.pushed = time.time()
            wait.message = self.roll.grid.push(declared.node, note, body, group=str(rnd.index))
            wait.node, wait.pushes = declared.node, wait.pushes + 1
            self.roll.retries += wait.pushes > 1
            self.roll.training[job.client.id] = rnd.index
            self.roll.wire_bytes["down"] += len(body)

    def _pull(
        self,
        jobs: Sequence[Job],
        waits: Sequence[_Wait],
        finished: dict[int, ClientResult],
        algorithm: Algorithm,
    ) -> None:
        """Reads the answers that have come; what cannot be read is that client's failure."""
        places = {wait.message: place for place, wait in enumerate(waits) if wait.message and place not in finished}
        for message, answer in self.roll.grid.pull(list(places)):
            place = places[message]
            job, wait = jobs[place], waits[place]
            wait.message = ""
            self.roll.training.pop(job.client.id, None)
            if answer.content is None and answer.code in api.AGAIN:
                self.roll.say(f"client {job.client.id}: {notes.reason(answer.reason)} Its job will be sent again.")
                continue
            if answer.content is None:
                finished[place] = ClientResult(
                    Failed(job.client, f"Flower's error {answer.code}: {notes.reason(answer.reason)}"), job.memory
                )
                continue
            most = 2 * size(algorithm.expected(Reply(job.client, job.sent, {}))) + 2 * size(job.sent) + ROOM
            try:
                note, payload = api.read(answer.content, most)
                text = json.dumps(note).encode()
            except BROKEN as error:
                finished[place] = ClientResult(
                    Failed(job.client, f"its reply could not be read: {notes.reason(error)}"), job.memory
                )
                continue
            self.roll.wire_bytes["up"] += len(payload)
            if str(note.get("refused", "")).startswith("it has not been told"):
                self.roll._greeted.pop(wait.node, None)  # its disk is new: hello again, then the job
                continue
            content = len(text).to_bytes(8, "little") + text + payload
            finished[place] = self._read(job, content, algorithm)
            if isinstance(finished[place][0], Reply):
                self.store.put(wait.key, content)

    def _read(self, job: Job, content: bytes, algorithm: Algorithm) -> ClientResult:
        """One client's end of the round from its answer. Its memory is a digest: the node keeps the tensors."""
        try:
            end = 8 + int.from_bytes(content[:8], "little")
            note = json.loads(content[8:end])
            reference = note.get("memory", "")
            if reference and not notes.is_digest(reference):
                raise ValueError("what it remembers has no name")
            if "failed" in note or "refused" in note:
                return ClientResult(
                    Failed(job.client, notes.reason(note.get("refused") or note.get("failed"))), job.memory
                )
            returned = canonical(unpack(content[end:])[1]["returned"])
        except BROKEN as error:
            return ClientResult(Failed(job.client, f"its reply could not be read: {notes.reason(error)}"), job.memory)
        reply = Reply(job.client, job.sent, returned, notes.read_metrics(note.get("metrics")))
        return ClientResult(reply, notes.as_memory(reference))

    def _watch(
        self,
        jobs: Sequence[Job],
        waits: Sequence[_Wait],
        finished: dict[int, ClientResult],
        passed: float,
    ) -> None:
        """Notices nodes that came, went or were restarted, and clients whose time is over."""
        self.roll.look()
        for place, (job, wait) in enumerate(zip(jobs, waits, strict=True)):
            if place in finished:
                continue
            node = self.roll.online.get(wait.node)
            declared = self.roll.declared.get(job.client.id)
            if wait.message and (
                (node is not None and node.activated > wait.pushed + 1.0)  # a restart loses what the node had pulled
                or (declared is not None and declared.node != wait.node)
            ):
                self.roll.say(f"client {job.client.id} was restarted: its job is sent again.")
                wait.message = ""
            if self.deadline is not None and passed > self.deadline:
                finished[place] = ClientResult(Failed(job.client, f"no answer within {self.deadline:g} s"), job.memory)


@dataclass(frozen=True)
class ScoredEverywhere:
    """The server's worker, whose scores include those of the nodes that score."""

    inner: Worker
    roll: Roll
    seconds: float
    stop: Callable[[], bool]

    def of(self, client: Client) -> ClientWorker:
        return self.inner.of(client)

    def evaluate(self, update: Tensors) -> Score:
        """Scores on the server's held-out rows, and as ``nodes_...`` on those of the nodes."""
        score = self.inner.evaluate(update)
        return Score(score.metrics | score_everywhere(self.roll, update, self.seconds, self.stop), score.generations)


def score_everywhere(roll: Roll, update: Tensors, seconds: float, stop: Callable[[], bool]) -> dict[str, float]:
    """Scores of an update on the rows of the clients whose policies allow it, weighted by their number of rows."""
    recipe, asked, began = notes.recipe_digest(roll.page), {}, time.time()
    body = pack({}, {"update": canonical(update)})
    for declared in roll.declared.values():
        if declared.scores and declared.node in roll.online:
            asked[roll.grid.push(declared.node, {"do": "score", "recipe": recipe}, body)] = declared.client
    got: list[tuple[int, dict[str, float]]] = []
    while asked and time.time() - began < seconds and not stop():
        for message, answer in roll.grid.pull(list(asked)):
            client = asked.pop(message)
            if answer.content is None:
                continue
            try:
                note, _ = api.read(answer.content, notes.NOTE_BYTES)
            except BROKEN:
                continue
            if metrics := notes.read_metrics(note.get("metrics")):
                got.append((client.num_samples, metrics))
        time.sleep(api.POLL)
    names = set.intersection(*(set(metrics) for _, metrics in got)) if got else set()
    total = sum(rows for rows, _ in got)
    return {f"nodes_{name}": sum(rows * metrics[name] for rows, metrics in got) / total for name in sorted(names)}


def run_name(folder: Path, output: Path, resume: bool) -> str:
    """Our name of the run that writes into ``output``: a new one, or that of the run which is resumed."""
    path = folder / "runs.json"
    known: dict[str, str] = json.loads(path.read_text()) if path.is_file() else {}
    place = str(output.absolute())
    if not resume or place not in known:
        known[place] = f"{time.time_ns():x}"
        scratch = folder / ".runs.json.writing"
        scratch.write_text(json.dumps(known, indent=1))
        scratch.replace(path)
    return known[place]
