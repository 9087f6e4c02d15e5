"""The section `privacy` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedllm.config.types import Between, Positive
from fedllm.errors import FedError


@dataclass(frozen=True)
class Privacy:
    """What a run guarantees, and to whom. Off by default.

    Args:
        unit: what is hidden: nothing, a whole ``client`` from readers and other clients (the server is trusted), or one
            ``example`` of a client, also from the server.
        epsilon: the budget of the whole run at ``delta``; the noise follows from it. A run stops before the round that
            would pass it.
        noise_multiplier: z, instead of an epsilon: noise of standard deviation ``z clip`` upon a sum.
        delta: below 1 / clients, or 1 / rows of the smallest client.
        clip: C, the largest norm of a client's step, as products over the whole model; or of one row's gradient.
        cohort: of ``client``: ``public``, anybody may know who took part, or ``secret``, each client by a coin of its
            own that the server alone sees (Poisson sampling).
        sampler: of a public cohort: ``round_robin``, all equally often, or ``uniform``.
        noise: from the system's entropy (``os``), or ``seeded``, repeatable, which guarantees nothing.
    """

    unit: Literal["none", "client", "example"] = "none"
    epsilon: Positive | None = None
    noise_multiplier: Positive | None = None
    delta: Between = 1e-5
    clip: Positive = 0.5
    cohort: Literal["public", "secret"] = "public"
    sampler: Literal["round_robin", "uniform"] = "round_robin"
    noise: Literal["os", "seeded"] = "os"

    def __post_init__(self) -> None:
        if self.unit == "none":
            return
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise FedError(
                f"privacy.unit={self.unit} needs privacy.epsilon (the budget, from which the noise follows) or "
                "privacy.noise_multiplier, one of the two: privacy.epsilon=8 is a common start."
            )
