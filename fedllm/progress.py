"""What a person sees while a run is going: rounds, the client that trains now, its steps, the loss, the time left.

On a terminal a panel that redraws itself, with one line a finished round above it; anywhere else those lines alone.
What is shown is one frozen value, replaced at every event and drawn by another thread, so a step costs microseconds and
a drawing never sees half an event.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedllm.core import CohortEntry
from fedllm.reports.formatting import is_fraction, metric, number, size, span

FRAMES_PER_SECOND = 4
WIDEST = 110
MARGIN = 3
"""Columns left free at the right: the terminal echoes ``^C`` there, and on a full line half a panel would stay."""

SMOOTHING = 0.8
"""Share of the past in the running loss; five steps are its memory."""


class Silent:
    """A display nobody sees: other processes, tests, programs."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def round(self, index: int, cohort: Sequence[CohortEntry]) -> None:
        pass

    def client(self, id: str) -> None:
        pass

    def step(self, loss: float | None = None) -> None:
        pass

    def evaluating(self, name: str) -> None:
        pass

    def finish_round(self, record: Mapping[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class View:
    """All that the panel shows. Times are seconds of the clock the display was given.

    Args:
        first: the first round this process runs; above 1 when a run resumes, and the pace is taken from there.
        index: the current round, 0 before the first.
        finished: the clients of this round that are done, with their last running loss.
        steps: steps of the current client; ``round_steps`` those of the clients before it in this round.
        losses: the mean train loss of every finished round.
        evaluating: what is evaluated now, empty while clients train.
        evaluated: the last evaluation in words, empty before the first.
    """

    title: str
    rounds: int
    started: float
    first: int = 0
    index: int = 0
    closed: bool = True
    cohort: tuple[CohortEntry, ...] = ()
    current: str = ""
    finished: Mapping[str, float | None] = field(default_factory=dict)
    steps: int = 0
    round_steps: int = 0
    loss: float | None = None
    losses: tuple[float, ...] = ()
    evaluating: str = ""
    evaluated: str = ""

    @property
    def share(self) -> float:
        """Rounds done since ``first``, the current one counted by its steps."""
        if self.index == 0:
            return 0.0
        if self.closed:
            return self.index - self.first + 1.0
        planned = sum(steps for _, _, steps in self.cohort)
        return self.index - self.first + (min(1.0, (self.round_steps + self.steps) / planned) if planned else 0.0)

    def left(self, now: float) -> float | None:
        """Seconds to the end at the pace so far; None before there is a pace."""
        share, total = self.share, self.rounds - self.first + 1
        return (now - self.started) * max(0.0, total - share) / share if share > 0 else None


class Progress:
    """The display of a run on a console: a live panel on a terminal, one line a round elsewhere.

    Args:
        rounds: rounds of the whole run, those before a resume included.
        title: the run in a few words.
        console: where to; standard output by default.
        clock: seconds, never backwards.
    """

    def __init__(
        self, rounds: int, title: str, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or Console()
        self._clock = clock
        self._view = View(title, rounds, started=clock())
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._view = replace(self._view, started=self._clock())
        if watched(self._console):
            self._live = Live(
                console=self._console,
                get_renderable=lambda: panel(self._view, self._clock(), self._console.width - MARGIN),
                refresh_per_second=FRAMES_PER_SECOND,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()  # shows the cursor again and gives stdout and stderr back, whatever ended the run
            self._live = None

    def round(self, index: int, cohort: Sequence[CohortEntry]) -> None:
        first = self._view.first or index
        started = self._view.started if self._view.first else self._clock()
        self._view = replace(
            self._view, index=index, first=first, started=started, closed=False, cohort=tuple(cohort), current="",
            finished={}, steps=0, round_steps=0, loss=None, evaluating="",
        )  # fmt: skip

    def client(self, id: str) -> None:
        before = self._view
        finished = {**before.finished, before.current: before.loss} if before.current else before.finished
        self._view = replace(
            before, current=id, finished=finished, round_steps=before.round_steps + before.steps, steps=0, loss=None,
            evaluating="",
        )  # fmt: skip

    def step(self, loss: float | None = None) -> None:
        before = self._view
        if loss is not None and math.isfinite(loss):
            past = loss if before.loss is None else before.loss
            self._view = replace(before, steps=before.steps + 1, loss=SMOOTHING * past + (1 - SMOOTHING) * loss)
        else:
            self._view = replace(before, steps=before.steps + 1)

    def evaluating(self, name: str) -> None:
        self._view = replace(self._view, evaluating=name)

    def finish_round(self, record: Mapping[str, Any]) -> None:
        before = self._view
        evaluated = scores(record)
        loss = number(record.get("train_loss"))
        self._view = replace(
            before,
            closed=True,
            finished={id: None for id, _, _ in before.cohort},
            current="",
            evaluating="",
            losses=before.losses if loss is None else (*before.losses, loss),
            evaluated=f"round {before.index}: {'  '.join(evaluated)}" if evaluated else before.evaluated,
        )
        text = line(record, before.rounds)
        self._console.print(Text(text), soft_wrap=True)
        self._console.file.flush()


def watched(console: Console) -> bool:
    """Whether a person looks at it live. Rich takes FORCE_COLOR, as in CI, for a terminal: ask the file too."""
    return console.is_interactive and console.file.isatty()


def scores(record: Mapping[str, Any]) -> list[str]:
    """The evaluation of a round in words, the fractions first."""
    found = {key: number(value) for key, value in (record.get("eval") or {}).items()}
    known = [(key, value) for key, value in found.items() if value is not None]
    known.sort(key=lambda pair: not is_fraction(pair[0]))
    return [f"{'held-out loss' if key == 'loss' else key} {metric(key, value)}" for key, value in known]


def line(record: Mapping[str, Any], rounds: int) -> str:
    """One finished round on one line of ASCII."""
    parts = [f"round {record.get('round', '?')}/{rounds}"]
    loss = number(record.get("train_loss"))
    parts.append("loss -" if loss is None else f"loss {metric('loss', loss)}")
    parts += scores(record)
    for key, word in (("bytes_down", "down"), ("bytes_up", "up")):
        moved = number(record.get(key))
        parts += [] if moved is None else [f"{word} {size(moved)}"]
    seconds = number(record.get("seconds"))
    parts += [] if seconds is None else [span(seconds)]
    refused = record.get("refused") or {}
    parts += [f"refused {len(refused)}"] if refused else []
    return "  ".join(parts)


def panel(view: View, now: float, width: int) -> RenderableType:
    """The live panel, ``width`` columns at most, nine lines at most."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(ratio=1, min_width=8)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True, min_width=24)
    before = max(view.first - 1, 0)
    table.add_row("round", bar(before + view.share, view.rounds), f"{view.index}/{view.rounds}", pace(view, now))
    seats = {id: (place, rank, steps) for place, (id, rank, steps) in enumerate(view.cohort, start=1)}
    place, rank, steps = seats.get(view.current, (0, 0, 0))
    here = Text.assemble((view.current, "bold"), f"  rank {rank}") if place else Text("")
    done = len(view.finished)
    table.add_row("client", bar(done, len(seats)), f"{max(place, done)}/{len(seats)}", here)
    if view.evaluating:
        table.add_row("eval", ProgressBar(pulse=True, animation_time=now), "", Text(view.evaluating, style="bold"))
    else:
        loss = Text("") if view.loss is None else Text.assemble("loss ", (metric("loss", view.loss), "bold"))
        table.add_row("step", bar(view.steps, steps), f"{view.steps}/{steps}" if steps else f"{view.steps}", loss)
    rest: list[RenderableType] = [table]
    if view.cohort:
        rest += [Text(""), roll(view, most=max(2, min(width, WIDEST) // 14))]
    if view.losses:
        last = metric("loss", view.losses[-1])
        rest.append(one_line(("loss by round  ", "dim"), (sparkline(view.losses), "cyan"), f"  {last}"))
    if view.evaluated:
        rest.append(one_line(("last score     ", "dim"), view.evaluated))
    return Panel(
        Group(*rest), title=Text(view.title, style="bold"), title_align="left", border_style="cyan", padding=(0, 1),
        width=min(width, WIDEST),
    )  # fmt: skip


def one_line(*parts: str | tuple[str, str]) -> Text:
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def bar(completed: float, total: float) -> ProgressBar:
    return ProgressBar(
        total=max(total, 1), completed=min(completed, total), complete_style="cyan", finished_style="green"
    )


def pace(view: View, now: float) -> Text:
    left = view.left(now)
    return Text.assemble((span(max(0.0, now - view.started)), "bold"), "" if left is None else f"  {span(left)} left")


def roll(view: View, most: int) -> Text:
    """The cohort in order: who is done, who trains now, who waits; ``most`` of them around the current client."""
    order = [id for id, _, _ in view.cohort]
    at = order.index(view.current) if view.current in order else len(order) * bool(view.closed or view.evaluating)
    start = max(0, min(at - most // 3, len(order) - most))
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"+{start}  " if start else "", style="green")
    for id, rank, _ in view.cohort[start : start + most]:
        if id == view.current and not view.evaluating:
            text.append(f"> {id} r{rank}  ", style="bold yellow")
        elif id in view.finished or id == view.current:
            loss = view.finished.get(id)
            text.append(f"✓ {id} r{rank}{'' if loss is None else f' {loss:.2f}'}  ", style="green")
        else:
            text.append(f"· {id} r{rank}  ", style="dim")
    after = len(order) - start - most
    text.append(f"+{after}" if after > 0 else "", style="dim")
    return text


def sparkline(values: Sequence[float], most: int = 40) -> str:
    """The last values as bars of eight heights, the highest and lowest of them at the ends of the scale."""
    shown = values[-most:]
    low, high = min(shown), max(shown)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / (high - low)) if high > low else 3] for value in shown)
