"""``fedllm serve``: the server of a federation across machines."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from fedllm.core import Display, Fleet, Worker
from fedllm.errors import FedError
from fedllm.federation.build import build_federation
from fedllm.federation.declared import DeclaredFederation
from fedllm.fleets.flower import keys, notes
from fedllm.fleets.flower.children import Child, said
from fedllm.fleets.flower.gate import Gate, free_port, refuse_taken
from fedllm.fleets.flower.store import Store
from fedllm.fleets.interrupt import once
from fedllm.fleets.processes import Processes
from fedllm.recipe import Recipe
from fedllm.recipe import load as load_recipe
from fedllm.reports.run_record import json_in

KEPT = 2000
"""Replies that the server keeps of a run, beside its checkpoints: two rounds of a thousand clients."""


SCORING = 600.0
"""Seconds that nodes have for scoring where the recipe has no ``run.deadline``."""


def init(folder: Path, host: str, port: int, insecure: bool) -> str:
    """Makes a server's folder; what to do next, in words."""
    keys.create_server(folder, host, port, insecure)
    if insecure:
        return f"{folder} is ready, plain HTTP on {host}:{port}. Allow a client: fedllm serve allow {folder} ID"
    return (
        f"{folder} is ready for {host}:{port}. Give {folder}/ca.crt to every node, and move {folder}/ca/ca.key off "
        f"this machine.\nAllow a client: fedllm serve allow {folder} ID NODE.pub"
    )


def allow(folder: Path, id: str, public: Path | None, most_rows: int | None, most_rank: int | None) -> str:
    """Lets a client in; the answer in words."""
    keys.allow(folder, id, public, most_rows, most_rank)
    return f"client {id} may take part: {', '.join(keys.load_server(folder).clients)}."


def status(folder: Path) -> str:
    """Who is there and who trains, as the server last wrote it."""
    keys.load_server(folder)
    told = json_in(folder / "status.json")
    if not told:
        raise FedError(f"{folder} has not served yet: fedllm serve {folder} RECIPE")
    age = time.time() - told["at"]
    lines = [f"as of {age:.0f} s ago{', so the server does not run now' if age > 120 else ''}"]
    for id, client in told["clients"].items():
        seen = "never seen" if client["seen"] is None else f"seen {time.time() - client['seen']:.0f} s ago"
        here = f"trains round {client['round']}" if client["round"] else "waits"
        size = "" if client["rows"] is None else f"  {client['rows']} rows  rank {client['rank']}"
        lines.append(f"{id:20}  {here if client['online'] else f'away, {seen}'}{size}")
    lines.append(f"jobs sent again: {told['sent_again']}")
    return "\n".join(lines)


def serve(
    folder: Path, arguments: Sequence[str], run: Callable[..., None], *, rehearsal: bool, least: int | None
) -> int:
    """Waits for the clients, and runs a recipe with them.

    Args:
        run: ``train.train``: the recipe, once its clients are known.
        rehearsal: every node takes the share of a public corpus that the recipe's partition deals to its client.
        least: clients to begin with; all that are allowed by default.
    """
    from fedllm.fleets.flower import api

    server, recipe = keys.load_server(folder), load_recipe(arguments)
    notes.refuse_unserved(recipe)
    if recipe.worker.whole and not rehearsal:
        raise FedError(f"worker.name={recipe.worker_name}: networks are served with --rehearsal, which deals the rows.")
    if not server.clients:
        raise FedError(f"{folder} allows no client yet: fedllm serve allow {folder} ID NODE.pub")
    least = len(server.clients) if least is None else least
    if not 1 <= least <= len(server.clients):
        raise FedError(f"--least {least}: {folder} allows {len(server.clients)} clients.")
    refuse_taken(server.host if keys.is_loopback(server.host) else "", server.port)
    torch.set_num_threads(recipe.run.threads or max(1, len(os.sched_getaffinity(0))))
    say = said("server")
    name = notes_run_name(folder, recipe)
    with ExitStack() as stack:
        link, secret = _superlink(stack, folder, server, say)
        stopped = stack.enter_context(once())
        grid = stack.enter_context(api.Grid(link, secret, stopped))
        from fedllm.fleets.flower.fleet import Flower, Roll, ScoredEverywhere

        roll = Roll(grid, server.clients, recipe.page, say, folder / "status.json")
        _wait(roll, sorted(server.clients), least, stopped, say)
        federation = _rehearsal(recipe, roll.declared) if rehearsal else _declared(recipe, roll.declared)
        _check_resumed(recipe, federation.clients)
        store = Store(folder / "replies", KEPT)

        def lead(worker: Worker, display: Display, asked: Callable[[], bool]) -> tuple[Worker, Fleet]:
            def stop() -> bool:
                return asked() or stopped()

            scored = ScoredEverywhere(worker, roll, recipe.run.deadline or SCORING, stop)
            return scored, Flower(roll, name, store, display, stop, recipe.run.deadline)

        run(recipe, Processes(), federation=federation, lead=lead, notes_of=roll.notes)
    _forget(folder)
    return 0


def notes_run_name(folder: Path, recipe: Recipe) -> str:
    from fedllm.fleets.flower.fleet import run_name

    return run_name(folder, recipe.output, recipe.run.resume)


def _superlink(stack: ExitStack, folder: Path, server: keys.Server, say: Callable[[str], None]) -> tuple[Any, bytes]:
    """Starts the stock SuperLink on loopback and the gate in front of it, and registers the clients' keys."""
    from fedllm.fleets.flower import api

    secret = keys.read_secret(folder / "link.secret")
    port, database = free_port(), folder / "link.db"
    tls = None
    if not server.insecure:
        keys.read_secret(folder / "server.key")
        tls = {"ca": folder / "ca.crt", "certificate": folder / "server.crt", "key": folder / "server.key"}
    os.close(os.open(database, os.O_RDWR | os.O_CREAT, 0o600))  # payloads lie in it
    stack.enter_context(
        Child(
            api.superlink_command(port, database, folder / "link.secret", tls),
            api.environment(folder / "flower"),
            folder / "superlink.log",
            lambda tail: say("the SuperLink ended; it is started again."),
            pause=1.0,
        )
    )
    link = api.Link(f"127.0.0.1:{port}", None if tls is None else tls["ca"].read_bytes())
    control = api.Control(link)
    try:
        registered = control.registered()
        known = keys.clients_by_key(server.clients)
        for key, id in known.items():
            if key not in registered:
                control.register(key, id)
        for key in registered.keys() - known.keys():
            if not server.insecure:
                control.unregister(registered[key])
    finally:
        control.close()
    stack.enter_context(
        Gate(
            server.host if keys.is_loopback(server.host) else "0.0.0.0",
            server.port,
            f"{'http' if tls is None else 'https'}://127.0.0.1:{port}",
            None if tls is None else tls["ca"],
            None if tls is None else tls["certificate"],
            None if tls is None else tls["key"],
            None if tls is None else lambda: known,
        )
    )
    say(f"nodes are awaited on {server.host}:{server.port}")
    return link, secret


def _wait(roll: Any, ids: Sequence[str], least: int, stopped: Callable[[], bool], say: Callable[[str], None]) -> None:
    """Until so many clients have said who they are."""
    told = 0.0
    while len(roll.declared) < least:
        if stopped():
            raise FedError("stopped before the first round: nothing was trained.")
        roll.look()
        missing = [id for id in ids if id not in roll.declared]
        if missing and time.monotonic() - told > 60:
            told = time.monotonic()
            say(f"waiting for {', '.join(missing[:8])}")
        time.sleep(0.3)


def _rehearsal(recipe: Recipe, declared: Mapping[str, Any]) -> Any:
    """The federation whose rows the recipe's partition deals out; every node must have taken its own share.

    Raises:
        FedError: a node holds other rows than the recipe gives to its client.
    """
    federation = build_federation(recipe)
    for client in federation.clients:
        there = declared.get(client.id)
        if there is None:
            raise FedError(
                f"the recipe deals rows to client {client.id}, and no such client is here. The clients of a rehearsal "
                f"are {', '.join(c.id for c in federation.clients[:8])}."
            )
        if there.client != client:
            raise FedError(f"client {client.id} declares {there.client}, and the recipe has {client}.")
    return federation


def _declared(recipe: Recipe, declared: Mapping[str, Any]) -> DeclaredFederation:
    """The federation of the clients that are here, in own data's order of ids."""
    there = [declared[id] for id in notes.sorted_ids(list(declared))]
    return DeclaredFederation(recipe, [d.client for d in there], {d.client.id: d.steps for d in there})


def _check_resumed(recipe: Recipe, clients: Sequence[Any]) -> None:
    """Raises FedError where a run would go on with other clients, rows or ranks: every weight would change silently."""
    before = json_in(recipe.output / "partition.json") if recipe.run.resume else None
    if not before:
        return
    then = [(id, client["rank"], client["rows"]) for id, client in before["clients"].items()]
    now = [(c.id, c.rank, c.num_samples) for c in clients]
    if then != now:
        differ = [f"{a} -> {b}" for a, b in zip(then, now, strict=False) if a != b] or [f"{len(then)} -> {len(now)}"]
        raise FedError(
            f"run.resume=true, and the clients (id, rank, rows) are not those it began with: {'; '.join(differ[:3])}."
        )


def _forget(folder: Path) -> None:
    """Removes the SuperLink's database when a run has ended: it holds the payloads, and keys are registered anew."""
    for path in folder.glob("link.db*"):
        path.unlink(missing_ok=True)
