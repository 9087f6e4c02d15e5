"""``fedllm join``: a machine that is one client of a server's federations, within its owner's policy."""

from __future__ import annotations

import base64
import os
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import torch

from fedllm.algorithms import ALGORITHMS
from fedllm.core import Client, Tensors
from fedllm.errors import FedError
from fedllm.federation.build import build_federation
from fedllm.federation.declared import OwnRows
from fedllm.fleets.flower import keys, notes, policy
from fedllm.fleets.flower.children import Child, said
from fedllm.fleets.flower.gate import ASK, KEY_HEADER, free_port
from fedllm.fleets.flower.node import BROKEN, Node, approve, approved
from fedllm.fleets.flower.policy import Policy
from fedllm.fleets.interrupt import once
from fedllm.recipe import load as load_recipe
from fedllm.recipe.page import build

MESSAGE_BYTES = 4 << 30
"""The longest message that is looked at; the policy's bound is asked after that."""


class LocalSeat:
    """One client's place in a recipe on this machine.

    Args:
        page: the recipe's, as the policy made it.
        id: the client that this node is.
        dealt: whether the recipe deals its rows to it; else all that are there are its own.
    """

    def __init__(self, page: Mapping[str, Any], id: str, dealt: bool = True) -> None:
        recipe = build("node", page)
        self.algorithm = recipe.algorithm
        if not dealt and recipe.worker.whole:
            raise FedError(f"worker.name={recipe.worker_name}: a node's own rows are text; images are for rehearsals.")
        self._federation: Any = build_federation(recipe) if dealt else OwnRows(recipe, id)
        known = {client.id: client for client in self._federation.clients}
        if id not in known:
            raise FedError(f"the recipe deals rows to {', '.join(list(known)[:8])}, and to no client {id}.")
        self.client: Client = known[id]
        self.steps: int = recipe.worker.steps_for(self.client.num_samples)
        self._worker: Any = None

    def worker(self) -> Any:
        """The worker that trains; the model is loaded once."""
        if self._worker is None:
            self._worker = self._federation.worker(lambda loss: None)
        return self._worker

    def score(self, update: Tensors) -> Mapping[str, float]:
        """Scores of an update on the client's own held-out rows."""
        metrics: Mapping[str, float] = self.worker().evaluate(update).metrics
        return metrics


def init(folder: Path, client: str, server: str, insecure: bool) -> str:
    """Makes a node's folder with its keys and a policy to edit; what to do next, in words."""
    public = keys.create_node(
        folder,
        client,
        policy.TEMPLATE.format(client=client, server=server, more="insecure: true\n" if insecure else ""),
    )
    return (
        f"{public}\n\n{folder}/node.pub is for the server's operator, who gives you ca.crt: put it into {folder}/.\n"
        f"Then write {folder}/policy.yaml and start: fedllm join {folder}"
    )


def dry_run(folder: Path, arguments: Sequence[str]) -> str:
    """What this node would answer to a recipe's hello; nothing is sent, no weight is loaded."""
    own = _policy(folder)
    page = notes.public_page(load_recipe(arguments).page)
    asked = own if own.ask == "never" else replace(own, ask="always")
    node = Node(folder, asked, lambda made: LocalSeat(made, own.client, own.dealt), say=lambda text: None, keep=False)
    answer, _ = node.handle({"do": "hello", "recipe": page, "versions": notes.versions()}, b"")
    digest = notes.recipe_digest(page)
    if "client" not in answer:
        return f"{own.client} does not take part: {answer.get('refused', answer.get('failed'))}"
    told = answer["client"]
    waits = f" Its owner has to approve it first: fedllm join approve {folder} {digest}"
    return (
        f"{own.client} takes part in recipe {digest}: {told['num_samples']} rows, rank {told.get('rank', 0)}, "
        f"{answer['steps']} steps a round.{'' if own.ask == 'always' or digest in approved(folder) else waits}"
    )


def join(folder: Path) -> int:
    """Takes part for ever. Ends at Ctrl-C, or in a sentence where the server does not know this node."""
    own = _policy(folder)
    say = said(own.client)
    ca = None if own.insecure else folder / "ca.crt"
    if own.insecure and not keys.is_loopback(own.server.rpartition(":")[0].strip("[]")):
        raise FedError(f"insecure: true with server {own.server}: without TLS it is for 127.0.0.1 alone.")
    if ca is not None and not ca.is_file():
        raise FedError(f"{ca} is missing: the server's operator gives it to you.")
    _settle_environment(own)
    torch.set_num_threads(own.threads)
    secret = keys.read_secret(folder / "node.secret")
    if ca is not None:
        keys.read_secret(folder / "node")
    _ask_server(own, folder, ca)

    from fedllm.fleets.flower import api

    port = own.port or free_port()
    command = api.supernode_command(
        own.server, port, folder / "node.secret", ca, None if ca is None else folder / "node"
    )
    node = Node(folder, own, lambda page: LocalSeat(page, own.client, own.dealt), say)
    supernode = Child(
        command,
        api.environment(folder / "flower"),
        folder / "supernode.log",
        lambda tail: say(f"the SuperNode ended ({_last(tail)}); it is started again in a few seconds."),
    )
    with once() as stopped, _alone(folder), supernode:
        say(f"waiting for {own.server}")
        for task in api.tasks(api.Link(f"127.0.0.1:{port}"), secret, stopped):
            if task is None:
                continue
            with suppress(api.Gone, httpx.HTTPError):  # its session is over: the server sends the job again
                if task.content is None:
                    say(f"refused a bundle that is not fedllm's ({task.bundle[:12]}): nothing of it was run.")
                    task.refuse_bundle()
                    continue
                try:
                    note, payload = api.read(task.content, MESSAGE_BYTES)
                except BROKEN:
                    note, payload = {}, b""
                task.answer(*node.handle(note, payload))
    return 130


def say_yes(folder: Path, digest: str) -> str:
    """Approves a recipe that waits for a person."""
    _policy(folder)
    approve(folder, digest)
    return f"recipe {digest} is approved; the server asks again within half a minute."


def _policy(folder: Path) -> Policy:
    path = folder / "policy.yaml"
    if not path.is_file():
        raise FedError(f"{folder} is no node's folder: make one with `fedllm join init {folder} --client ID`.")
    own = policy.load(path)
    for rule in own.rules:
        try:
            policy.known_rule(rule, ALGORITHMS)
        except FedError as error:
            raise FedError(f"{path}: {error}") from error
    if isinstance(place := own.data.get("path"), str) and not Path(place).is_absolute():
        return _with_path(own, str((folder / place).absolute()))
    return own


def _with_path(own: Policy, place: str) -> Policy:
    return replace(own, data={**own.data, "path": place})


def _settle_environment(own: Policy) -> None:
    """A node asks the Hub for nothing unless its owner says so."""
    if not own.models_download:
        os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def _ask_server(own: Policy, folder: Path, ca: Path | None) -> None:
    """Raises FedError where the server can be reached and would not let this node in; waits for nothing."""
    headers = {}
    if ca is not None:
        public = keys.registered_form(keys.public_key_text(folder / "node.pub"))
        headers[KEY_HEADER] = base64.b64encode(public).decode()
    try:
        context: Any = True if ca is None else ssl.create_default_context(cafile=str(ca))
    except ssl.SSLError as error:
        raise FedError(f"{ca} is no certificate in PEM: the server's operator gives you ca.crt.") from error
    url = f"{'http' if ca is None else 'https'}://{own.server}{ASK}"
    try:
        answer = httpx.post(url, headers=headers, verify=context, timeout=10.0, trust_env=False)
    except httpx.ConnectError as error:
        text = str(error)
        if "CERTIFICATE_VERIFY_FAILED" in text:
            raise FedError(
                f"{own.server} shows a certificate that {ca} does not vouch for, or that is for another name: ask its "
                f"operator for the right ca.crt ({text.rpartition('failed: ')[2][:120]})."
            ) from error
        if "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER_FAILURE" in text:
            raise FedError(
                f"{own.server} speaks plain HTTP, and this node TLS: another program has that port."
            ) from error
        return  # not there yet: the SuperNode tries for ever
    except httpx.HTTPError as error:
        if ca is None:
            raise FedError(f"{own.server} does not speak plain HTTP: leave insecure out of the policy.") from error
        return
    if answer.status_code == 200 and ca is not None and answer.text != own.client:
        raise FedError(f"{own.server} knows this node's key as client {notes.reason(answer.text)}, not {own.client}.")
    if answer.status_code == 401:
        raise FedError(
            f"{own.server} does not know this node's key: its operator runs "
            f"`fedllm serve allow DEPLOY {own.client} node.pub` with {folder}/node.pub."
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raises FedError where another process is this node already."""
    from fedllm.storage.run_folder import held

    try:
        with held(folder / "flower"):
            yield
    except FedError as error:
        if "another process" in str(error):
            raise FedError(f"another `fedllm join {folder}` runs already: a client has one node.") from error
        raise


def _last(tail: str) -> str:
    """The reason in a SuperNode's last lines."""
    for sign, words in (
        ("CERTIFICATE_VERIFY_FAILED", "the server's certificate is not vouched for"),
        ("Failed to activate", "its old session has not lapsed yet, or the server does not know its key"),
        ("ConnectError", "the server is not there"),
    ):
        if sign in tail:
            return words
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no output"
