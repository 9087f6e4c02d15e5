"""Who takes part in a round: samplers that look at no data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch

from fedllm.core import Client, Round
from fedllm.privacy.noise import coin

Sampler = Callable[[Sequence[Client], float, Round], list[Client]]
"""Of all clients and the share that takes part, the cohort of a round."""


def size(clients: Sequence[Client], participation: float) -> int:
    """``int(participation * N)``, one at least."""
    return max(1, int(participation * len(clients) + 1e-9))  # 0.3 * 10 is 2.9999999999999996 in some orders


def uniform(clients: Sequence[Client], participation: float, rnd: Round) -> list[Client]:
    """A cohort of fixed size, uniformly without replacement."""
    many = size(clients, participation)
    if many == len(clients):
        return list(clients)
    chosen = torch.randperm(len(clients), generator=rnd.rng("cohort"))[:many].sort().values
    return [clients[i] for i in chosen.tolist()]


def round_robin(clients: Sequence[Client], participation: float, rnd: Round) -> list[Client]:
    """The next clients of one shuffled circle, so that all take part equally often, give or take one round."""
    order = torch.randperm(len(clients), generator=Round(0, rnd.seed).rng("round robin")).tolist()
    many = size(clients, participation)
    start = (rnd.index - 1) * many
    return [clients[i] for i in sorted(order[(start + j) % len(order)] for j in range(many))]


def poisson(
    clients: Sequence[Client], participation: float, rnd: Round, flip: Callable[[float], bool] = coin
) -> list[Client]:
    """Each client by a coin of its own that nobody sees; the cohort may be empty."""
    return [client for client in clients if flip(participation)]


def largest(sampler: Sampler, clients: Sequence[Client], participation: float, seed: int, rounds: int) -> int:
    """The rounds of the client that takes part most often."""
    if size(clients, participation) == len(clients):
        return rounds
    taken = Counter(c.id for t in range(1, rounds + 1) for c in sampler(clients, participation, Round(t, seed)))
    return max(taken.values())
