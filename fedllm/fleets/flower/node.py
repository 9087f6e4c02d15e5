"""A node's side of the messages: what is asked, what the policy says, what is kept, what is answered.

Nothing here knows of Flower: ``handle`` takes a note and bytes and gives a note and bytes.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from fedllm.core import Algorithm, Client, Failed, Job, Tensors
from fedllm.errors import FedError
from fedllm.fleets.flower import notes
from fedllm.fleets.flower import policy as policies
from fedllm.fleets.flower.policy import Policy, Refused
from fedllm.fleets.flower.store import Store
from fedllm.fleets.train_client import attempt
from fedllm.wire.messages import pack, unpack
from fedllm.wire.serialization import canonical

MEMORIES = 8
"""Memories that are kept: a refused update and a resumed run go back a few rounds."""

REPLIES = 4
"""Replies that are kept: two rounds, with one attempt repeated in each."""

BROKEN = (ValueError, KeyError, TypeError, AttributeError, RecursionError, UnicodeError, SafetensorError)
"""What reading a message that is none can raise."""


class Seat(Protocol):
    """One client's place in a recipe, on the machine that has its rows."""

    algorithm: Algorithm
    client: Client
    steps: int

    def worker(self) -> Any:
        """The worker that trains; the model is loaded at the first call."""
        ...

    def score(self, update: Tensors) -> Mapping[str, float]:
        """Scores of an update on the client's own held-out rows."""
        ...


@dataclass
class Node:
    """A node at work.

    Args:
        folder: the node's own.
        policy: its owner's.
        take: makes its seat of a page that the policy allowed; raises FedError where the recipe is unsound.
        say: tells the operator.
        keep: writes what hello brought to the disk.
    """

    folder: Path
    policy: Policy
    take: Callable[[Mapping[str, Any]], Seat]
    say: Callable[[str], None] = print
    keep: bool = True
    _seats: dict[str, Seat] = field(default_factory=dict)

    @property
    def replies(self) -> Store:
        return Store(self.folder / "replies", REPLIES)

    @property
    def memories(self) -> Store:
        return Store(self.folder / "memory", MEMORIES)

    def handle(self, note: Mapping[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        """The answer to one message. It raises nothing: a reason leaves the node without a row in it."""
        asked = note.get("do")
        answers = {"hello": self._hello, "train": self._train, "score": self._score}
        try:
            if not isinstance(asked, str) or asked not in answers:
                raise Refused(f"it knows hello, train and score, and not {notes.reason(asked)[:40]!r}.")
            return answers[asked](note, payload)
        except Refused as error:
            self.say(f"refused: {error}")
            return {"refused": str(error)}, b""
        except FedError as error:
            self.say(f"refused: {error}")
            return {"refused": str(error) if asked == "hello" else type(error).__name__}, b""
        except BROKEN as error:
            self.say(f"refused: a message that is none ({type(error).__name__}: {str(error)[:200]})")
            return {"refused": f"the message could not be read ({type(error).__name__})."}, b""
        except Exception as error:
            self.say(f"failed: {type(error).__name__}: {str(error)[:300]}")
            return {"failed": f"it ended in {type(error).__name__}"}, b""

    def _hello(self, note: Mapping[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        wrong, other = notes.version_sentence(notes.versions(), note.get("versions") or {})
        if wrong:
            raise Refused(f"versions differ (the server's first): {wrong}.")
        if other:
            self.say(f"versions differ in the last part: {other}")
        page = note["recipe"]
        if not isinstance(page, Mapping):
            raise ValueError("the recipe is no page")
        digest = notes.recipe_digest(page)
        seat = self._seat(digest, page)
        self._approved(digest)
        if self.keep:
            self._pages.put(digest, json.dumps(page).encode())
        told = dataclasses.replace(seat.client, num_samples=self._rows(seat.client.num_samples))
        self.say(f"hello: {self._in_words(page)}, {seat.client.num_samples} rows, rank {seat.client.rank}")
        return {
            "client": notes.client_note(told),
            "steps": seat.steps,
            "versions": notes.versions(),
            "score": self.policy.score,
        }, b""

    def _train(self, note: Mapping[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        key, reference = note["key"], note.get("memory", "")
        if not notes.is_digest(key) or not (reference == "" or notes.is_digest(reference)):
            raise ValueError("the job has no key")
        if (done := self.replies.get(key)) is not None:
            self.say(f"round {note['round']['index']}: sent again from the disk")
            return _opened(done)
        policies.check_hours(self.policy, datetime.datetime.now())
        seat = self._known(note["recipe"])
        rnd = notes.read_round(note["round"])
        if len(payload) > policies.count_bytes(self.policy.most.bytes_down):
            raise Refused(f"it was sent {len(payload)} bytes, and its policy takes {self.policy.most.bytes_down}.")
        _, groups = unpack(payload)
        memory: Tensors = {}
        if reference:
            kept = self.memories.get(reference)
            if kept is None:
                return {"failed": "what it remembered is gone", "memory": reference}, b""
            memory = unpack(kept)[1]["memory"]
        job = Job(seat.client, groups["sent"], memory)
        self.say(f"round {rnd.index}: training")
        started = time.monotonic()
        done_now, after = attempt(seat.algorithm, seat.worker(), job, rnd)
        seconds = time.monotonic() - started
        if isinstance(done_now, Failed):
            self.say(f"round {rnd.index}: {done_now.reason}")  # the whole reason stays here: it may quote a row
            return {"failed": done_now.reason.partition(":")[0], "memory": reference}, b""
        body = pack({}, {"returned": done_now.returned})
        if seconds > self.policy.most.seconds or len(body) > policies.count_bytes(self.policy.most.bytes_up):
            raise Refused(
                f"its update took {seconds:.0f} s and has {len(body)} bytes; its policy allows "
                f"{self.policy.most.seconds:g} s and {self.policy.most.bytes_up}."
            )
        answer = {"metrics": self._told(done_now.metrics), "memory": self._remember(after)}
        self.replies.put(key, _sealed(answer, body))
        self._log(round=rnd.index, bytes_down=len(payload), bytes_up=len(body), **done_now.metrics)
        loss = done_now.metrics.get("train_loss")
        self.say(f"round {rnd.index}: trained, {'' if loss is None else f'loss {loss:.3f}, '}{seconds:.1f} s")
        return answer, body

    def _score(self, note: Mapping[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        if not self.policy.score:
            raise Refused("its policy scores nothing.")
        seat = self._known(note["recipe"])
        _, groups = unpack(payload)
        scores = dict(seat.score(groups["update"]))
        self.say("scored: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        return {"metrics": scores}, b""

    def _known(self, digest: Any) -> Seat:
        """The seat of a recipe that hello brought, by its digest; from the disk after a restart."""
        if digest in self._seats:
            return self._seats[digest]
        page = self._pages.get(digest) if notes.is_digest(digest) else None
        if page is None:
            raise Refused("it has not been told this recipe.")
        self._approved(digest)
        return self._seat(digest, json.loads(page))

    def _seat(self, digest: str, page: Mapping[str, Any]) -> Seat:
        if digest not in self._seats:
            seat = self.take(policies.node_page(self.policy, page))
            policies.check_client(self.policy, seat.client.rank, seat.steps)
            self._seats.clear()  # one model at a time
            self._seats[digest] = seat
        return self._seats[digest]

    def _approved(self, digest: str) -> None:
        if self.policy.ask == "never":
            raise Refused("its owner takes no recipe now (ask: never).")
        if self.policy.ask == "first" and digest not in approved(self.folder):
            self.say(f"a recipe waits for a person: fedllm join approve {self.folder} {digest}")
            raise Refused(f"its owner has to approve the recipe first (digest {digest}).")

    @property
    def _pages(self) -> Store:
        return Store(self.folder / "recipes", MEMORIES)

    def _rows(self, count: int) -> int:
        return count if self.policy.tell.num_samples == "exact" else max(100, round(count, -2))

    def _told(self, metrics: Mapping[str, float]) -> dict[str, float]:
        told = self.policy.tell.metrics
        return {name: value for name, value in metrics.items() if name in told or name.startswith("own_")}

    def _remember(self, memory: Tensors) -> str:
        if not memory:
            return ""
        packed = pack({}, {"memory": canonical(memory)})
        digest = notes.wide_digest(packed)
        self.memories.put(digest, packed)
        return digest

    def _log(self, **line: Any) -> None:
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as stream:
            at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            stream.write(json.dumps({"at": at, **line}) + "\n")

    def _in_words(self, page: Mapping[str, Any]) -> str:
        return f"{page['algorithm']['name']} on {page['model']['name']}, {page['run']['rounds']} rounds"


def approved(folder: Path) -> Sequence[str]:
    """The digests of the recipes that a person said yes to."""
    path = folder / "approved"
    return path.read_text().split() if path.is_file() else []


def approve(folder: Path, digest: str) -> None:
    """Says yes to a recipe.

    Raises:
        FedError: that is no digest.
    """
    if not notes.is_digest(digest):
        raise FedError(f"{digest[:80]!r} is no digest of a recipe: 32 hex digits, as `fedllm join` shows them.")
    with (folder / "approved").open("a") as stream:
        stream.write(f"{digest}\n")


def _sealed(note: Mapping[str, Any], body: bytes) -> bytes:
    text = json.dumps(note).encode()
    return len(text).to_bytes(8, "little") + text + body


def _opened(content: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return {**json.loads(content[8:end]), "again": True}, content[end:]
