"""``fedllm aggregate``: the server without a run. PEFT folders in, one PEFT folder out, by any rule of the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedllm.algorithms import LOW_RANK
from fedllm.config import plain_yaml
from fedllm.config.schema import parse_section
from fedllm.config.suggest import nearest
from fedllm.core import Algorithm, Client, Model, Reply, Round, Tensors
from fedllm.errors import FedError
from fedllm.lowrank import LowRank, as_lowrank, fill
from fedllm.server.admission import admit, misfit
from fedllm.storage import peft_folder as adapters
from fedllm.storage.peft_folder import Adapter

_ROUND = Round(index=1, seed=0)


@dataclass(frozen=True)
class Aggregated:
    """What was done.

    Args:
        clients: one for each folder, in order; ``rank`` is the largest of the folder's modules.
        shares: ``p_i`` by client id.
        update: what was written, by module name.
        base_models: every base model that the folders name; more than one deserves a look.
    """

    clients: tuple[Client, ...]
    shares: Mapping[str, float]
    update: Mapping[str, LowRank]
    base_models: tuple[str, ...]


def aggregate(
    rule: str,
    folders: Sequence[Path],
    out: Path,
    *,
    samples: Sequence[int] | None = None,
    global_: Path | None = None,
    rank: int | None = None,
    options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Aggregated:
    """One round's server half on PEFT folders, scales folded in; ``out`` becomes a PEFT folder of scale 1.

    Args:
        rule: a name in ``LOW_RANK``.
        folders: the clients' adapters: any mix of ranks and alphas, the same modules and shapes.
        samples: ``n_i``; equal by default.
        global_: the adapter of the round before, of which client i was sent what the rule sends to its folder's rank.
            Without it W_t = 0.
        rank: of the written adapter: the best approximation of it; by default all of the result is kept.
        options: the rule's constants, by field name.

    Raises:
        FedError: before anything is written.
    """
    algorithm = _algorithm(rule, options or {})
    if not folders:
        raise FedError("there is nothing to aggregate: give the folder of at least one adapter.")
    counts = _counts(samples, len(folders))
    adapters.check_free(Path(out), overwrite=overwrite)
    read = [adapters.read(Path(folder)) for folder in folders]
    before = None if global_ is None else adapters.read(Path(global_))
    _agree([*map(str, folders), *([str(global_)] if before else [])], [*read, *([before] if before else [])])
    largest = max(max(update.shape) for update in read[0].updates.values())
    if rank is not None and not 1 <= rank <= largest:
        raise FedError(f"--rank must be from 1 to {largest}, the largest side of a module, got {rank}.")
    if before and (reason := misfit(before.updates, before.updates)):
        raise FedError(f"--global {global_} cannot be aggregated. {reason}")

    clients = [
        Client(id, n, max(update.rank for update in adapter.updates.values()))
        for id, n, adapter in zip(_ids(folders), counts, read, strict=True)
    ]
    weights = {name: torch.empty(*update.shape, device="meta") for name, update in read[0].updates.items()}
    try:
        algorithm.validate(clients)
        state = algorithm.init(Model(weights, before.updates if before else {}), clients)
        replies = [_reply(algorithm, state, client, adapter) for client, adapter in zip(clients, read, strict=True)]
        replies, refused = admit(replies, algorithm.expected)
        for client, reason in refused.items():
            raise FedError(f"{client} cannot be aggregated. {reason}")
        shares = algorithm.shares(state, replies)
        served = algorithm.served(algorithm.aggregate(state, replies, _ROUND))
    except ValueError as error:  # the algebra's own words: factors of different rank, mostly
        raise FedError(f"{rule} cannot aggregate these adapters: {error}") from error

    update = {name: _exported(name, W, rank) for name, W in served.items()}
    known = [adapter for adapter in [before, *read] if adapter is not None]
    bases = tuple(dict.fromkeys(adapter.base_model for adapter in known if adapter.base_model))
    adapters.write(
        Path(out),
        update,
        base_model=bases[0] if bases else None,
        targets=known[0].targets if len({adapter.targets for adapter in known}) == 1 else None,
        task_type=known[0].task_type,
        overwrite=overwrite,
    )
    return Aggregated(tuple(clients), shares, update, bases)


def _algorithm(rule: str, options: Mapping[str, Any]) -> Algorithm:
    """The rule with these constants."""
    _check_names(rule, options)
    return LOW_RANK[rule](**options)


def _check_names(rule: str, options: Iterable[str]) -> None:
    """Refuses a rule or an option that there is not; the nearest is offered."""
    if rule not in LOW_RANK:
        raise FedError(f"{rule}: {nearest(rule, LOW_RANK, 'rule')}")
    fields = [field.name for field in dataclasses.fields(LOW_RANK[rule])]
    for name in options:
        if name not in fields:
            having = [n for n, cls in LOW_RANK.items() if name in {field.name for field in dataclasses.fields(cls)}]
            whose = f"it belongs to {', '.join(having)}" if having else "no rule has it"
            own = f"{rule} has {', '.join(fields)}" if fields else f"{rule} has no options"
            raise FedError(f"{rule} has no option {name!r}: {whose}; {own}.")


def _counts(samples: Sequence[int] | None, clients: int) -> Sequence[int]:
    if samples is None:
        return [1] * clients
    if len(samples) != clients:
        raise FedError(f"--samples has {len(samples)} counts for {clients} adapters: give one for each, in order.")
    if min(samples) < 1:
        raise FedError(f"--samples are rows that a client trained on, 1 or more each, got {min(samples)}.")
    return samples


def _ids(folders: Sequence[Path]) -> list[str]:
    """The folders' paths; one that comes again gets its position."""
    paths = [str(folder) for folder in folders]
    return [path if path not in paths[:i] else f"{path} ({i + 1})" for i, path in enumerate(paths)]


def _agree(names: Sequence[str], read: Sequence[Adapter]) -> None:
    """Raises FedError at the first module or shape in which an adapter differs from the first one."""
    first = {module: update.shape for module, update in read[0].updates.items()}
    for name, adapter in zip(names, read, strict=True):
        shapes = {module: update.shape for module, update in adapter.updates.items()}
        for module in sorted(first.keys() | shapes.keys()):
            if module not in shapes or module not in first:
                has, lacks = (names[0], name) if module in first else (name, names[0])
                raise FedError(f"the adapters must train the same modules: {has} has {module}, and {lacks} has not.")
            if first[module] != shapes[module]:
                raise FedError(
                    f"the adapters must fit one model: {module} is {first[module]} in {names[0]} "
                    f"and {shapes[module]} in {name}."
                )


def _reply(algorithm: Algorithm, state: Tensors, client: Client, adapter: Adapter) -> Reply:
    """What the client was sent, each module at its folder's rank, and what it returned."""
    ranks = {name: update.rank for name, update in adapter.updates.items()}
    sent = {r: algorithm.download(state, dataclasses.replace(client, rank=r), _ROUND) for r in set(ranks.values())}
    rank_of = {name: ranks.get(name.rpartition("/")[2], client.rank) for name in sent[client.rank]}  # GROUP/MODULE
    reply = Reply(client, {name: sent[r][name] for name, r in rank_of.items()}, adapter.updates)
    if algorithm.expected(reply).keys() != adapter.updates.keys():
        raise FedError(
            f"clients of {type(algorithm).__name__} return other things than adapters, so folders of adapters "
            f"cannot be aggregated by it: take another rule of {', '.join(LOW_RANK)}."
        )
    return reply


def _exported(name: str, W: LowRank | Tensor, rank: int | None) -> LowRank:
    """The served update as a product: all of it, or its best approximation as factors of exactly ``rank``."""
    tensors = (W.B, W.A) if isinstance(W, LowRank) else (W,)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise FedError(f"the aggregate of {name} is not finite: the adapters' values are too large for float32.")
    if rank is None:
        return W if isinstance(W, LowRank) else as_lowrank(W).balanced()
    return fill(as_lowrank(W).truncate(rank), rank, _ROUND.rng("fresh", name))


def parse_constants(rule: str, told: Sequence[str]) -> dict[str, Any]:
    """The rule's constants of ``key=value`` words, each of the type that a recipe's ``algorithm`` section gives it.

    Raises:
        FedError: a word without ``=``, a key that is another rule's or nobody's, a value out of range.
    """
    given: dict[str, Any] = {}
    for word in told:
        key, equals, value = word.partition("=")
        if not equals:
            raise FedError(f"--set {word}: give key=value, such as --set weights=fedavg.")
        try:
            given[key] = plain_yaml.parse(value) if value.lower() != "none" else None
        except FedError as error:
            raise FedError(f"--set {word[:200]}: {error}") from error
    _check_names(rule, given)
    parsed = parse_section(LOW_RANK[rule], given, rule)
    return {key: getattr(parsed, key) for key in given}


def summary(rule: str, out: Path, done: Aggregated) -> str:
    width = max(len(client.id) for client in done.clients)
    lines = [f"{'client':{width}}  rank  samples   share"]
    lines += [f"{c.id:{width}}  {c.rank:4}  {c.num_samples:7}  {done.shares[c.id]:6.4f}" for c in done.clients]
    ranks = sorted({update.rank for update in done.update.values()})
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    lines.append(f"{rule}: {len(done.update)} modules of rank {span} written to {out}")
    if len(done.base_models) > 1:
        lines.append(f"The adapters name different base models ({', '.join(done.base_models)}): the first was written.")
    return "\n".join(lines)
