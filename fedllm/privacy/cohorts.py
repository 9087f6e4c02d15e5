"""Who takes part in a round: samplers whose privacy is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fedllm.core import Client, Round
from fedllm.privacy.noise import coin


def size(clients: Sequence[Client], participation: float) -> int:
    """``int(participation * N)``, one at least."""
    return max(1, int(participation * len(clients) + 1e-9))


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
