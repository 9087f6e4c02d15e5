"""``fedllm aggregate``: the server without a run. PEFT folders in, one PEFT folder out, by any rule of the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fedllm.algorithms import LOW_RANK
from fedllm.config import plain_yaml
from fedllm.config.schema import parse_section
from fedllm.config.suggest import nearest
from fedllm.core import Algorithm, Client, Model, Reply, Round, Tensors
from fedllm.errors import FedError
from fedllm.export import adapter_folder
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
        remarks: what a reader should know of it, a sentence each.
    """

    clients: tuple[Client, ...]
    shares: Mapping[str, float]
    update: Mapping[str, LowRank]
    base_models: tuple[str, ...]
    remarks: tuple[str, ...] = ()


def aggregate(
    rule: str,
    folders: Sequence[Path],
    out: Path,
    *,
    samples: Sequence[int] | None = None,
    global_: Path | None = None,
    rank: int | None = None,
    options: Mapping[str, Any] | None = None,
    missing: Missing = "refuse",
    extras: Extras = "refuse",
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
        missing: of a module that some folders do not train. ``zero``: such a client returns what it was sent; ``skip``:
            the module is aggregated over the clients that have it, each set of clients by itself.
        extras: of biases and wholly trained modules: ``average`` them, weighted by rows, or ``drop`` them.

    Raises:
        FedError: before anything is written.
    """
    algorithm = _algorithm(rule, options or {})
    if not folders:
        raise FedError("there is nothing to aggregate: give the folder of at least one adapter.")
    counts = _counts(samples, len(folders))
    adapters.check_free(Path(out), overwrite=overwrite)
    read = [adapters.read(Path(folder), extras=extras != "refuse") for folder in folders]
    before = None if global_ is None else adapters.read(Path(global_), extras=extras != "refuse")
    _agree([*map(str, folders), *([str(global_)] if before else [])], [*read, *([before] if before else [])], missing)
    largest = max(max(update.shape) for adapter in read for update in adapter.updates.values())
    if rank is not None and not 1 <= rank <= largest:
        raise FedError(f"--rank must be from 1 to {largest}, the largest side of a module, got {rank}.")
    if before and (reason := misfit(before.updates, before.updates)):
        raise FedError(f"--global {global_} cannot be aggregated. {reason}")

    clients = [
        Client(id, n, max(update.rank for update in adapter.updates.values()))
        for id, n, adapter in zip(_ids(folders), counts, read, strict=True)
    ]
    served: dict[str, LowRank | Tensor] = {}
    shares: dict[str, float] = {}
    remarks: list[str] = []
    for modules, members in _groups(clients, read, missing):
        try:
            done, p, used = _average(algorithm, members, modules, before.updates if before else {})
        except ValueError as error:  # the algebra's own words: factors of different rank, mostly
            raise FedError(f"{rule} cannot aggregate these adapters: {error}") from error
        served |= done
        shares = {**p, **shares}
        if not used and len(set(counts)) > 1:
            remarks = [f"{rule} does not use --samples: its shares do not depend on the rows."]
        if len(members) < len(clients):
            names = ", ".join(client.id for client, _ in members)
            remarks.append(f"{len(modules)} modules were aggregated over {names} alone: the others do not train them.")

    update = {name: _exported(name, served[name], rank) for name in served}
    remarks += _kept(served, update, rank, max(client.rank for client in clients))
    known = [adapter for adapter in [before, *read] if adapter is not None]
    beside = _averaged_extras(folders, read, counts) if extras == "average" else {}
    if extras == "drop" and any(adapter.extras for adapter in read):
        remarks.append("Biases and wholly trained modules were dropped (--extras drop).")
    bases = tuple(dict.fromkeys(adapter.base_model for adapter in known if adapter.base_model))
    adapters.write(
        Path(out),
        update,
        base_model=bases[0] if bases else None,
        targets=known[0].targets if len({adapter.targets for adapter in known}) == 1 else None,
        task_type=known[0].task_type,
        overwrite=overwrite,
        extras=beside,
        modules_to_save=sorted({name for adapter in read for name in adapter.modules_to_save}) if beside else (),
        bias=next((adapter.bias for adapter in read if adapter.bias != "none"), "none") if beside else "none",
    )
    remarks += adapter_folder.copy_tokenizer([adapters.inside(Path(folder)) for folder in folders], Path(out))
    made = Aggregated(tuple(clients), shares, update, bases, tuple(remarks))
    adapter_folder.describe(Path(out), _record(rule, algorithm, made, missing, extras, global_ is not None))
    return made


Missing = Literal["refuse", "zero", "skip"]
Extras = Literal["refuse", "average", "drop"]
Members = list[tuple[Client, Adapter]]


def _groups(
    clients: Sequence[Client], read: Sequence[Adapter], missing: Missing
) -> Iterator[tuple[list[str], Members]]:
    """The modules that are aggregated together, over whom; the largest group first."""
    pairs = list(zip(clients, read, strict=True))
    modules = list(dict.fromkeys(name for adapter in read for name in adapter.updates))
    if missing != "skip":
        yield modules, pairs
        return
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in modules:
        groups.setdefault(tuple(client.id for client, adapter in pairs if name in adapter.updates), []).append(name)
    for having, named in sorted(groups.items(), key=lambda group: -len(group[1])):
        yield named, [(client, adapter) for client, adapter in pairs if client.id in having]


def _average(
    algorithm: Algorithm, members: Members, modules: Sequence[str], before: Mapping[str, LowRank]
) -> tuple[Tensors, Mapping[str, float], bool]:
    """The rule's round over these modules: what it serves, the shares, and whether these depend on the rows."""
    shapes = {name: a.updates[name].shape for _, a in members for name in modules if name in a.updates}
    weights = {name: torch.empty(*shapes[name], device="meta") for name in modules}
    clients = [client for client, _ in members]
    algorithm.validate(clients)
    state = algorithm.init(Model(weights, {name: before[name] for name in modules if name in before}), clients)
    replies = [_reply(algorithm, state, client, adapter, modules) for client, adapter in members]
    replies, refused = admit(
        replies,
        algorithm.expected,
        factors=algorithm.trained if algorithm.averages_factors else None,
        sent_known=bool(before),
    )
    for client, reason in refused.items():
        raise FedError(f"{client} cannot be aggregated. {reason}")
    shares = algorithm.shares(state, replies)
    equal = [dataclasses.replace(r, client=dataclasses.replace(r.client, num_samples=1)) for r in replies]
    used = algorithm.shares(state, equal) != shares
    return algorithm.served(algorithm.aggregate(state, replies, _ROUND)), shares, used


def _averaged_extras(folders: Sequence[Path], read: Sequence[Adapter], counts: Sequence[int]) -> dict[str, Tensor]:
    """FedAvg of the tensors beside the factors, each over the folders that have it, weighted by rows."""
    found: dict[str, list[tuple[Path, Tensor, int]]] = {}
    for folder, adapter, n in zip(folders, read, counts, strict=True):
        for name, value in adapter.extras.items():
            found.setdefault(name, []).append((folder, value, n))
    averaged = {}
    for name, parts in found.items():
        first, value, _ = parts[0]
        for folder, other, _ in parts:
            if other.shape != value.shape:
                raise FedError(
                    f"the adapters must fit one model: {name} is {tuple(value.shape)} in {first} and "
                    f"{tuple(other.shape)} in {folder}."
                )
        total = sum(n for _, _, n in parts)
        mean = sum(part.double() * (n / total) for _, part, n in parts)
        averaged[name] = torch.as_tensor(mean).float()
    return averaged


def _kept(
    served: Mapping[str, LowRank | Tensor], update: Mapping[str, LowRank], rank: int | None, clients: int
) -> list[str]:
    """The share of the update's norm that a smaller rank keeps; or that a rank is far above the clients'."""
    if rank is not None:
        whole = sum(float(as_lowrank(W).norm()) ** 2 for W in served.values())
        kept = sum(float(W.norm()) ** 2 for W in update.values())
        return [f"Rank {rank} keeps {100 * (kept / whole) ** 0.5 if whole else 100:.2f} % of the update's norm."]
    most = max(W.rank for W in update.values())
    if most > 2 * clients:
        return [
            f"The result has rank {most}, {most / clients:.1f} times the clients' largest: --rank R makes it smaller."
        ]
    return []


def _record(
    rule: str, algorithm: Algorithm, done: Aggregated, missing: Missing, extras: Extras, continued: bool
) -> dict[str, Any]:
    """Who weighed what, as plain values; folders by their last name, for paths name people and machines."""
    values = {f.name: getattr(algorithm, f.name) for f in dataclasses.fields(algorithm)}
    constants = {key: value if isinstance(value, int | float | str) else str(value) for key, value in values.items()}
    return {
        "rule": rule,
        "constants": {
            key: value if isinstance(value, int | float | str) else str(value) for key, value in constants.items()
        },
        "clients": [
            {
                "folder": Path(client.id).name,
                "rank": client.rank,
                "samples": client.num_samples,
                "share": done.shares.get(client.id),
            }
            for client in done.clients
        ],
        "base_models": list(done.base_models),
        "continued": continued,
        "missing": missing,
        "extras": extras,
        "modules": len(done.update),
        "ranks": sorted({update.rank for update in done.update.values()}),
        "remarks": list(done.remarks),
    }


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


def _agree(names: Sequence[str], read: Sequence[Adapter], missing: Missing) -> None:
    """Raises FedError at the first module or shape in which an adapter differs from the first one."""
    first = {module: update.shape for module, update in read[0].updates.items()}
    if missing != "refuse":
        return _fit(names, read)
    for name, adapter in zip(names, read, strict=True):
        shapes = {module: update.shape for module, update in adapter.updates.items()}
        for module in sorted(first.keys() | shapes.keys()):
            if module not in shapes or module not in first:
                has, lacks = (names[0], name) if module in first else (name, names[0])
                raise FedError(
                    f"the adapters must train the same modules: {has} has {module}, and {lacks} has not. "
                    "--missing zero counts it as no update, --missing skip averages over those who have it."
                )
            if first[module] != shapes[module]:
                raise FedError(
                    f"the adapters must fit one model: {module} is {first[module]} in {names[0]} "
                    f"and {shapes[module]} in {name}."
                )


def _fit(names: Sequence[str], read: Sequence[Adapter]) -> None:
    """Raises FedError where a module has two shapes."""
    known: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, adapter in zip(names, read, strict=True):
        for module, update in adapter.updates.items():
            owner, shape = known.setdefault(module, (name, update.shape))
            if shape != update.shape:
                raise FedError(
                    f"the adapters must fit one model: {module} is {shape} in {owner} and {update.shape} in {name}."
                )


def _reply(algorithm: Algorithm, state: Tensors, client: Client, adapter: Adapter, modules: Sequence[str]) -> Reply:
    """What the client was sent, each module at its folder's rank, and what it returned.

    Of a module that it does not train, it returns what a client would that did not move.
    """
    own = {name: update for name, update in adapter.updates.items() if name in modules}
    ranks = {name: update.rank for name, update in own.items()}
    every = {*ranks.values(), client.rank}
    sent = {r: algorithm.download(state, dataclasses.replace(client, rank=r), _ROUND) for r in every}
    rank_of = {name: ranks.get(name.rpartition("/")[2], client.rank) for name in sent[client.rank]}  # GROUP/MODULE
    reply = Reply(client, {name: sent[r][name] for name, r in rank_of.items()}, own)
    still = algorithm.expected(reply)
    if still.keys() != set(modules) or not all(isinstance(still[name], LowRank) for name in modules):
        raise FedError(
            f"clients of {type(algorithm).__name__} return other things than adapters, so folders of adapters "
            f"cannot be aggregated by it: take another rule of {', '.join(LOW_RANK)}."
        )
    return dataclasses.replace(reply, returned={name: own.get(name, still[name]) for name in modules})


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
    lines += done.remarks
    return "\n".join(lines)
