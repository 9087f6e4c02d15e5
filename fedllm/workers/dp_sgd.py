"""DP-SGD in a client (Abadi et al., 2016): Opacus' gradients of single rows and its optimizer, in TRL's trainer.

Every step draws each row by a coin of its own, clips each row's gradient to C, adds noise ``N(0, (z C)^2)`` to the sum
and divides by the *expected* number of rows. A step that draws no row is a step of noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fedllm.core import LocalTraining
from fedllm.errors import FedError
from fedllm.privacy import noise
from fedllm.privacy.noise import Noise

IGNORED = -100
"""The label of a token that no loss is taken of."""


@dataclass(frozen=True)
class DPSGD:
    """How a client's steps are made private.

    Args:
        noise_multiplier: z.
        clip: C, of a row's gradient over all that trains.
        batch_size: rows that a step is expected to draw.
        seeded: draws rows and noise from the client's own generator, for tests.
    """

    noise_multiplier: float
    clip: float
    batch_size: int
    seeded: bool = False

    def check(self, request: LocalTraining) -> None:
        """Raises FedError where a rule asks for steps that do not go through the noisy optimizer."""
        try:
            request.only("privacy.unit=example", "frozen", "factors", "alphas", "scale")
        except FedError as error:
            raise FedError(f"{error} Take a rule of plain steps, such as fedit, flora, fedhl or fedloru.") from error

    @contextmanager
    def on(self, trainer: Any, rnd_generator: torch.Generator) -> Iterator[None]:
        """The trainer's model with hooks, its steps private, for as long as the context lasts.

        The hooks come after a client's factors are in place: on parameters that are replaced later they see nothing.
        """
        from opacus.grad_sample import GradSampleHooks

        draws: Noise = noise.seeded(rnd_generator) if self.seeded else noise.from_system
        hooks = GradSampleHooks(trainer.model, batch_first=True, loss_reduction="mean")
        held, trainer.args.max_grad_norm = trainer.args.max_grad_norm, 0.0  # the clip is each row's
        trainer.private = Steps(self, draws, rnd_generator if self.seeded else None)
        try:
            yield
        finally:
            trainer.private, trainer.args.max_grad_norm = None, held
            hooks.cleanup()


@dataclass(frozen=True)
class Steps:
    """What the trainer asks for while its steps are private."""

    how: DPSGD
    draws: Noise
    generator: torch.Generator | None

    def batches(self, rows: Any, steps: int, collate: Callable[[Any], Any]) -> DataLoader[Any]:
        """Poisson batches, as many as steps."""
        q = min(1.0, self.how.batch_size / len(rows))

        def drawn() -> Iterator[list[int]]:
            for _ in range(steps):
                yield [i for i in range(len(rows)) if self._coin(q)]

        class Batches:
            def __iter__(self) -> Iterator[list[int]]:
                return drawn()

            def __len__(self) -> int:
                return steps

        return DataLoader(rows, batch_sampler=Batches(), collate_fn=lambda some: collate(some or [_no_row(rows)]))

    def _coin(self, q: float) -> bool:
        if self.generator is None:
            return noise.coin(q)
        return float(torch.rand((), generator=self.generator)) < q

    def optimizer(self, plain: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """``plain``, stepping on clipped and noisy sums."""
        from opacus.optimizers import DPOptimizer

        draws = self.draws

        class Private(DPOptimizer):
            def add_noise(self) -> None:
                std = self.noise_multiplier * self.max_grad_norm
                for p in self.params:
                    p.grad = (p.summed_grad + std * draws(tuple(p.shape)).to(p.summed_grad)).view_as(p)

            def step(self, closure: Any = None) -> Any:
                done = super().step(closure)
                self.zero_grad()  # transformers clears the model's gradients, not those of single rows
                return done

        return Private(
            plain,
            noise_multiplier=self.how.noise_multiplier,
            max_grad_norm=self.how.clip,
            expected_batch_size=self.how.batch_size,
        )


def _no_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row without any label: its gradient is 0."""
    first = rows[0]["input_ids"][0]
    return {"input_ids": [first, first], "labels": [IGNORED, IGNORED]}


def mean_over_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over rows of each row's mean over its tokens, in nats: no row's loss depends on another's length."""
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    counts = (targets != IGNORED).sum(1).clamp(min=1)
    return (losses.sum(1) / counts).mean()
