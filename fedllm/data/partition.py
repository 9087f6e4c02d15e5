"""Who holds which rows: seeded partitions of row indices, and what they gave to whom.

The functions take labels or a number of rows and return one ascending list of indices per client; an index is in one
list at most. `PARTITIONS` has the same rules as recipe sections. What a rule draws about *labels* depends only on the
seed, the clients and the set of labels, not on the rows: where a rule says so, the test rows follow the training rows.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedllm.config.types import Count, Positive, Whole
from fedllm.errors import FedError

Counts = NDArray[np.int64]
Shares = NDArray[np.float64]
Parts = list[list[int]]

REDRAWS = 5000
"""How often `dirichlet` draws anew before it says that the setting cannot be met."""


class Member(Protocol):
    """What a partition needs to know of a client."""

    @property
    def id(self) -> str: ...

    @property
    def rank(self) -> int: ...

    @property
    def level(self) -> str: ...


def blocks(n: int, clients: int) -> Parts:
    """Contiguous blocks whose sizes differ by one at most: text in its own order. Complete."""
    _fits(n, clients)
    return [block.tolist() for block in np.array_split(np.arange(n), clients)]


def iid(n: int, clients: int, seed: int) -> Parts:
    """A random permutation in chunks whose sizes differ by one at most. Complete."""
    _fits(n, clients)
    return [sorted(chunk.tolist()) for chunk in np.array_split(_rng(seed, "rows").permutation(n), clients)]


def dirichlet(labels: Sequence[Hashable], clients: int, eta: float, seed: int, minimum: int = 10) -> Parts:
    """Each class cut by its own draw from ``Dir(eta 1_N)``, clients with ``n / N`` rows or more left out. Complete.

    All classes are drawn anew until the smallest client has ``minimum`` rows (FedLMT's experiments, after PFLlib).

    Raises:
        FedError: where ``minimum`` is out of reach.
    """
    groups = _by_label(labels, clients)
    sizes = [len(rows) for rows in groups.values()]
    counts = capped(sizes, dirichlet_shares(sizes, clients, eta, seed, minimum))
    return _share_out(groups, counts, seed)


def dirichlet_shares(sizes: Sequence[int], clients: int, eta: float, seed: int, minimum: int = 10) -> Shares:
    """The draws of `dirichlet`, ``(classes, clients)``, before the cap: with `capped`, they cut a test set alike.

    Args:
        sizes: rows of each class.
    """
    _concentration(eta)
    n = sum(sizes)
    if minimum * clients > n:
        raise FedError(
            f"{clients} clients with at least {minimum} rows each need {minimum * clients} rows, and there are {n}. "
            f"Lower data.partition.minimum to {n // clients} or less, or take fewer clients."
        )
    rng = _rng(seed, "shares")
    best = 0
    for _ in range(REDRAWS):
        shares = rng.dirichlet(np.full(clients, eta), size=len(sizes))
        smallest = int(capped(sizes, shares).sum(axis=0).min())
        if smallest >= minimum:
            return shares
        best = max(best, smallest)
    raise FedError(
        f"No draw in {REDRAWS} gave each of {clients} clients {minimum} of {n} rows; the best left one with {best}. "
        f"Raise data.partition.eta (it is {eta}), lower data.partition.minimum, or take fewer clients."
    )


def capped(sizes: Sequence[int], shares: Shares) -> Counts:
    """Rows of each class for each client, ``(classes, clients)``: a client that holds ``n / N`` rows gets no more.

    Where a draw gives everything to full clients, the class is cut evenly among the others (0 / 0 otherwise).
    """
    clients = shares.shape[1]
    held = np.zeros(clients, dtype=np.int64)
    counts = []
    for size, share in zip(sizes, shares, strict=True):
        free = held * clients < sum(sizes)
        if not free.any():  # every row is dealt: the classes that are left are empty ones
            free[:] = True
        share = np.where(free, share, 0.0)
        counts.append(_cut(size, share if share.sum() > 0 else free.astype(np.float64)))
        held += counts[-1]
    return np.stack(counts)


def shards(
    labels: Sequence[Hashable], clients: int, s: int, seed: int, repeats: Literal["kept", "dropped"] = "kept"
) -> Parts:
    """Each class cut in ``s N / C`` equal shards, ``s`` shards a client: ``s`` classes a client, or fewer.

    A client may draw one class twice. ``kept`` gives it both shards, and all rows are dealt; ``dropped`` gives it one,
    as HeteroFL's experiments do, and nobody gets the other. Where ``C`` does not divide ``s N``, some classes have a
    shard more. The same seed gives the same classes to the same clients on the test rows.
    """
    groups = _by_label(labels, clients)
    _every_class_has_an_owner(clients, s, len(groups))
    rng = _rng(seed, "classes")
    slots = _slots(clients * s, len(groups), rng)
    hands = rng.permutation(np.repeat(np.arange(len(groups)), slots)).reshape(clients, s).tolist()
    if repeats == "dropped":
        hands = [sorted(set(hand)) for hand in hands]
    return _deal(groups, hands, [np.ones(slot) for slot in slots], seed)


def two_level(labels: Sequence[Hashable], clients: int, c: int, seed: int) -> Parts:
    """``c`` classes a client, unequal shares of each (the partition of pFedHN, which Yi et al. take over). Complete.

    A class has ``c N / C`` slots with weights from U(0.4, 0.6). Client after client takes, c times, a slot of a class
    that has the most slots left, ties at random. The same seed gives the same shares of the test rows.
    """
    groups = _by_label(labels, clients)
    _every_class_has_an_owner(clients, c, len(groups))
    rng = _rng(seed, "classes")
    left = _slots(clients * c, len(groups), rng)
    weights = [rng.uniform(0.4, 0.6, size=slot) for slot in left]
    hands: list[list[int]] = [[] for _ in range(clients)]
    for hand in hands:
        for _ in range(c):
            k = int(rng.choice(np.flatnonzero(left == left.max())))
            left[k] -= 1
            hand.append(k)
    return _deal(groups, hands, weights, seed)


def by_rank(n: int, ranks: Sequence[int], seed: int) -> Parts:
    """Random rows, and client ``i`` has ``n r_i / sum r`` of them, rounded: stronger hardware, more data. Complete."""
    _fits(n, len(ranks))
    edges = np.cumsum(_cut(n, _positive(ranks)))[:-1]
    return [sorted(chunk.tolist()) for chunk in np.split(_rng(seed, "rows").permutation(n), edges)]


def by_rank_skewed(labels: Sequence[Hashable], ranks: Sequence[int], eta: float, seed: int) -> Parts:
    """`by_rank`, and the larger the rank, the more skewed the label mix (FedHL, section VI.A, case 2). Complete.

    The paper gives no formula. Here a client draws its mix from ``Dir(eta_i C q)``, where ``eta_i = eta mean(r) / r_i``
    and ``q`` is the mix of all rows, and the draws are fitted to what there is (iterative proportional fitting:
    clients' sizes in one margin, classes' in the other). A client with a large part of all rows cannot be far from
    ``q``.
    """
    _concentration(eta)
    groups = _by_label(labels, len(ranks))
    weights = _positive(ranks)
    sizes = np.array([len(rows) for rows in groups.values()])
    wanted = _cut(len(labels), weights)  # (clients,)
    alpha = eta * len(sizes) * sizes / len(labels)
    rng = _rng(seed, "shares")
    mixes = np.stack([rng.dirichlet(alpha * weights.mean() / weight) for weight in weights])  # (clients, classes)
    fitted = _fit(mixes, wanted, sizes)
    counts = np.zeros(fitted.shape, dtype=np.int64)
    for i in range(len(ranks)):
        counts[i] = _take(int(wanted[i]), fitted[i], sizes - counts.sum(axis=0))
    return _share_out(groups, counts.T, seed)


@dataclass(frozen=True)
class Partition:
    """A rule of `PARTITIONS`; the fields are the keys of a recipe's ``data.partition``.

    Args:
        column: the column that holds a row's label. Rules that need no label only report its mix.

    A rule that ``names_clients`` reads from its column who the clients are, so the rows are read before the clients are
    made; the others deal the rows to clients ``c0``, ``c1`` and so on, who are checked before anything is read.
    """

    column: str | None = None

    by_label: ClassVar[bool] = False
    names_clients: ClassVar[bool] = False

    def clients(self, labels: Sequence[Hashable]) -> list[str]:
        """The ids of the clients that the rows name, in their order; of a rule that ``names_clients`` alone."""
        raise NotImplementedError

    def split(self, labels: Sequence[Hashable] | None, n: int, clients: Sequence[Member], seed: int) -> Parts:
        """The row indices of each client, in the order of ``clients``.

        Args:
            labels: one for each of the ``n`` rows, or None where the rule needs none.

        Raises:
            FedError: no rows, fewer rows than clients, no labels where the rule needs them, a client left without rows.
        """
        _fits(n, len(clients))
        if self.by_label and labels is None:
            raise FedError(
                f"{type(self).__name__} deals rows by label: set data.partition.column to one of its columns."
            )
        if labels is not None and len(labels) != n:
            raise ValueError(f"{len(labels)} labels for {n} rows.")
        parts = self._parts(labels if labels is not None else (), n, clients, seed)
        empty = [client.id for client, part in zip(clients, parts, strict=True) if not part]
        if empty:
            raise FedError(
                f"No rows for {'client' if len(empty) == 1 else 'clients'} {', '.join(empty)}: {self} leaves "
                f"{'it' if len(empty) == 1 else 'them'} none of {n}. Use more rows, fewer clients, or a milder split."
            )
        return parts

    def _parts(self, labels: Sequence[Hashable], n: int, clients: Sequence[Member], seed: int) -> Parts:
        raise NotImplementedError


@dataclass(frozen=True)
class IID(Partition):
    """Equal random chunks."""

    def _parts(self, labels: Sequence[Hashable], n: int, clients: Sequence[Member], seed: int) -> Parts:
        return iid(n, len(clients), seed)


@dataclass(frozen=True)
class Blocks(Partition):
    """Contiguous blocks, in the order of the file."""

    def _parts(self, labels: Sequence[Hashable], n: int, clients: Sequence[Member], seed: int) -> Parts:
        return blocks(n, len(clients))


@dataclass(frozen=True)
class Dirichlet(Partition):
    """Label skew: every class is shared out by a draw of its own.

    Args:
        eta: concentration; 0.3 in FedHL's experiments, 0.5 in FedLMT's. The smaller, the more skewed.
        minimum: rows of the smallest client.
    """

    eta: Positive = 0.3
    minimum: Whole = 10

    by_label: ClassVar[bool] = True

    def _parts(self, labels: Sequence[Hashable], n: int, clients: Sequence[Member], seed: int) -> Parts:
        return dirichlet(labels, len(clients), self.eta, seed, self.minimum)


@dataclass(frozen=True)
class ClassesPerClient(Partition):
    """A few classes a client, in equal shards.

    Args:
        classes: classes a client holds, at most.
        repeats: what a client that draws a class twice gets: both shards (``kept``), or one (``dropped``).
    """

    classes: Count = 2
    repeats: Literal["kept", "dropped"] = "kept"

    by_label: ClassVar[bool] = True

    def _parts(self, labels: Sequence[Hashable], n: int, clients: Sequence[Member], seed: int) -> Parts:
        return shards(labels, len(clients), self.classes, seed, self.repeats)


@dataclass(frozen=True)
class TwoLevel(Partition):
    """A few classes a client, in unequal shares.

    Args:
        classes: classes a client holds, at most; 2 of 10 and 10 of 100 in Yi et al.'s experiments.
    """

    classes: Count = 2

    by_label: ClassVar[bool] = True

    def _parts(self, labels: Sequence[Hashable], n: int, clients: Sequence[Member], seed: int) -> Parts:
        return two_level(labels, len(clients), self.classes, seed)


@dataclass(frozen=True)
class ByRank(Partition):
    """Quantity by rank.

    Args:
        eta: concentration of the label mix of a client of average rank; larger ranks are more skewed. ``null``: one mix
            for all, and no label is needed.
    """

    eta: Positive | None = None

    def _parts(self, labels: Sequence[Hashable], n: int, clients: Sequence[Member], seed: int) -> Parts:
        ranks = [client.rank for client in clients]
        if self.eta is None:
            return by_rank(n, ranks, seed)
        if len(labels) == 0:
            raise FedError(
                "data.partition.eta skews the mix of labels: set data.partition.column to a column of the data."
            )
        return by_rank_skewed(labels, ranks, self.eta, seed)


PARTITIONS: dict[str, type[Partition]] = {
    "iid": IID,
    "blocks": Blocks,
    "dirichlet": Dirichlet,
    "classes_per_client": ClassesPerClient,
    "two_level": TwoLevel,
    "by_rank": ByRank,
}
"""Every rule by the name that ``data.partition.name`` takes."""


def describe(
    kind: str,
    parts: Sequence[Sequence[int]],
    labels: Sequence[Hashable] | None,
    n: int,
    clients: Sequence[Member],
    seed: int,
) -> dict[str, Any]:
    """Rows, label mix and level of each client, and how many of the ``n`` rows nobody got; plain JSON values.

    Labels become text; without labels each mix is empty.
    """
    return {
        "kind": kind,
        "seed": seed,
        "undealt_rows": n - sum(len(part) for part in parts),
        "clients": {
            client.id: {"rows": len(part), "rank": client.rank, "labels": _mix(part, labels)}
            | ({"level": client.level} if client.level else {})
            for client, part in zip(clients, parts, strict=True)
        },
    }


def _mix(part: Sequence[int], labels: Sequence[Hashable] | None) -> Mapping[str, int]:
    if labels is None:
        return {}
    counts = Counter(labels[i] for i in part)
    return {str(label): counts[label] for label in sorted(counts, key=_order)}


def _rng(seed: int, *key: object) -> np.random.Generator:
    """A generator of its own for every key: what is drawn about labels does not move with the number of rows."""
    digest = hashlib.blake2b(repr((seed, "partition", *key)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _fits(n: int, clients: int) -> None:
    if clients < 1:
        raise FedError("There are no clients to give rows to: set clients.rank or clients.count.")
    if n == 0:
        raise FedError("The training data is empty: there are no rows to give to the clients. Check data.path.")
    if clients > n:
        raise FedError(f"{clients} clients cannot share {n} rows, one each at least. Use more rows or fewer clients.")


def _by_label(labels: Sequence[Hashable], clients: int) -> dict[Hashable, Counts]:
    """The rows of each class, classes in sorted order."""
    _fits(len(labels), clients)
    groups: dict[Hashable, list[int]] = {}
    for i, label in enumerate(labels):
        groups.setdefault(label, []).append(i)
    return {label: np.array(groups[label]) for label in sorted(groups, key=_order)}


def _order(label: Any) -> tuple[str, Any]:
    """Sorts numbers as numbers and text as text, also where a column has both."""
    return ("", int(label)) if isinstance(label, int | np.integer) else (type(label).__name__, label)


def _cut(size: int, weights: Shares) -> Counts:
    """``size`` rows in proportion to ``weights``, each count less than one row off; they sum to ``size``.

    The edge after the last positive weight is ``size`` itself, so that rounding leaves no row to a client of weight 0.
    """
    edges = np.cumsum(weights)
    inner = np.floor(edges * size / edges[-1]).astype(np.int64)  # in this order: whole weights divide exactly
    return np.diff(np.where(edges == edges[-1], size, inner), prepend=0)


def _take(wanted: int, mix: Shares, left: Counts) -> Counts:
    """``wanted`` rows of the classes by ``mix``, no more of a class than is ``left`` of it; ``wanted <= sum(left)``."""
    taken = np.zeros_like(left)
    while short := wanted - int(taken.sum()):
        weights = np.where(left > taken, np.maximum(mix, 1e-12), 0.0)  # a class of share 0 may be all that is left
        taken += np.minimum(left - taken, _cut(short, weights))
    return taken


def _pieces(rows: Counts, counts: Counts, rng: np.random.Generator) -> list[list[int]]:
    """Random disjoint pieces of ``rows``, of ``counts`` rows each."""
    return [piece.tolist() for piece in np.split(rng.permutation(rows), np.cumsum(counts)[:-1])]


def _share_out(groups: Mapping[Hashable, Counts], counts: Counts, seed: int) -> Parts:
    """Gives each client ``counts[k, i]`` random rows of class k; ``counts`` is ``(classes, clients)``."""
    parts: Parts = [[] for _ in range(counts.shape[1])]
    for k, (rows, count) in enumerate(zip(groups.values(), counts, strict=True)):
        for part, piece in zip(parts, _pieces(rows, count, _rng(seed, "rows", k)), strict=True):
            part.extend(piece)
    return [sorted(part) for part in parts]


def _fit(mixes: Shares, rows: Counts, columns: Counts, rounds: int = 100) -> Shares:
    """The matrix closest to ``mixes`` with these row and column sums (Deming and Stephan, 1940), nearly."""
    fitted = np.maximum(mixes, 1e-12)  # a draw of exactly 0 could never be scaled up
    for _ in range(rounds):
        fitted *= rows[:, None] / fitted.sum(axis=1, keepdims=True)
        fitted *= columns / fitted.sum(axis=0)
    return fitted


def _concentration(eta: float) -> None:
    if not (math.isfinite(eta) and eta > 0):
        raise FedError(f"data.partition.eta={eta}: the concentration of a Dirichlet distribution is a number above 0.")


def _positive(ranks: Sequence[int]) -> Shares:
    if min(ranks) < 1:
        raise FedError(f"Rows in proportion to rank need ranks of 1 and more, got {min(ranks)}. Set clients.rank.")
    return np.array(ranks, dtype=np.float64)


def _every_class_has_an_owner(clients: int, per_client: int, classes: int) -> None:
    if per_client < 1 or per_client > classes:
        raise FedError(
            f"data.partition.classes={per_client}: a client holds from 1 to all {classes} classes of this data."
        )
    if clients * per_client < classes:
        raise FedError(
            f"{clients} clients of {per_client} classes hold {clients * per_client} classes at most, and the data has "
            f"{classes}: some would be nobody's. Set data.partition.classes to {math.ceil(classes / clients)} or more."
        )


def _slots(total: int, classes: int, rng: np.random.Generator) -> Counts:
    """``total`` slots over the classes as evenly as they go; which classes have one more is drawn."""
    slots = np.full(classes, total // classes)
    slots[rng.permutation(classes)[: total % classes]] += 1
    return slots


def _deal(groups: Mapping[Hashable, Counts], hands: list[list[int]], weights: list[Shares], seed: int) -> Parts:
    """Gives each client, for each class in its hand, that class's next piece."""
    pieces = []
    for k, (rows, weight) in enumerate(zip(groups.values(), weights, strict=True)):
        pieces.append(iter(_pieces(rows, _cut(len(rows), weight), _rng(seed, "rows", k))))
    return [sorted(i for k in hand for i in next(pieces[k])) for hand in hands]
