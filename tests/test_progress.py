import io
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rich.console import Console

from fedllm.core import Display
from fedllm.progress import Progress, Silent, View, line, panel, sparkline
from fedllm.reports.formatting import metric, size, span

COHORT = [("c0", 4, 10), ("c1", 8, 10)]
RECORD = {
    "round": 3,
    "train_loss": 0.8123,
    "bytes_down": 1_234_567,
    "bytes_up": 623_456,
    "seconds": 42.3,
    "eval": {"exact_match": 0.4375},
}


@contextmanager
def terminal(width: int = 100) -> Iterator[tuple[Console, list[bytes]]]:
    """A console on a real pseudo-terminal, and what arrived at its other end."""
    ours, theirs = pty.openpty()
    seen: list[bytes] = []

    def drain() -> None:
        try:
            while chunk := os.read(ours, 65536):
                seen.append(chunk)
        except OSError:  # what Linux answers once the other end is closed
            pass

    reader = threading.Thread(target=drain)
    reader.start()
    with os.fdopen(theirs, "w") as file:
        yield Console(file=file, width=width, height=30, force_terminal=True, _environ={"TERM": "xterm"}), seen
    reader.join(5)
    os.close(ours)


def tell(display: Display) -> None:
    with display as p:
        p.evaluating("base model")
        for index in (1, 2):
            p.round(index, COHORT)
            for id, _, steps in COHORT:
                p.client(id)
                for _ in range(steps):
                    p.step(1.0)
            p.finish_round(RECORD | {"round": index})


def drawn(view: View, now: float, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(panel(view, now, width))
    return console.export_text()


def test_a_finished_round_is_one_plain_line():
    assert line(RECORD, 5) == "round 3/5  loss 0.812  exact_match 43.8%  down 1.2 MB  up 623 kB  42 s"


def test_a_line_survives_a_record_with_nothing_in_it():
    assert line({}, 5) == "round ?/5  loss -"
    assert line({"round": 1, "train_loss": float("nan"), "eval": None, "refused": {"c1": "NaN in A"}}, 5) == (
        "round 1/5  loss -  refused 1"
    )


def test_off_a_terminal_there_is_one_flushed_line_a_round_and_no_escape_code(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # CI sets it, and rich then believes in a terminal
    out = io.StringIO()
    tell(Progress(2, "a title", Console(file=out)))
    lines = out.getvalue().splitlines()
    assert [text.split("  ")[0].split("\x1b")[0] for text in lines] == ["round 1/2", "round 2/2"]
    assert "\x1b[?25l" not in out.getvalue()  # the cursor was never hidden: nothing was live


def test_on_a_terminal_the_lines_stay_and_the_cursor_comes_back():
    with terminal() as (console, seen):
        tell(Progress(2, "a title", console))
    text = b"".join(seen).decode()
    assert "a title" in text
    assert text.count("round 1/2  loss 0.812") == 1
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_passes_through_and_the_terminal_is_given_back(error):
    stdout = sys.stdout
    with terminal() as (console, seen):
        with pytest.raises(error), Progress(2, "a title", console) as p:
            p.round(1, COHORT)
            raise error
        assert sys.stdout is stdout
    text = b"".join(seen).decode()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_ctrl_c_in_a_real_terminal_ends_the_program_with_the_cursor_on():
    program = (
        "import time; from fedllm.progress import Progress\n"
        "with Progress(2, 'a title') as p:\n"
        "    p.round(1, [('c0', 4, 10)]); p.client('c0'); time.sleep(60)\n"
    )
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=theirs, stderr=subprocess.DEVNULL, env=os.environ | {"TERM": "xterm"}
    )
    os.close(theirs)
    text = b""
    while b"c0" not in text:  # the panel is up
        text += os.read(ours, 65536)
    child.send_signal(signal.SIGINT)
    try:
        while chunk := os.read(ours, 65536):
            text += chunk
    except OSError:
        pass
    os.close(ours)
    assert child.wait(10) == -signal.SIGINT
    assert text.rindex(b"\x1b[?25h") > text.rindex(b"\x1b[?25l")


def test_a_step_costs_less_than_a_millisecond_with_the_panel_up():
    with terminal() as (console, _), Progress(1, "a title", console) as p:
        p.round(1, [(f"c{i}", 8, 10) for i in range(100)])
        p.client("c7")
        start = time.perf_counter()
        for _ in range(2000):
            p.step(1.0)
        assert (time.perf_counter() - start) / 2000 < 1e-3


def test_the_panel_shows_who_trains_how_far_and_how_long():
    """4 rounds of 2 clients with 10 steps; 1 round, 1 client and 5 steps are done: 1.75 rounds in 70 s leave 90 s."""
    clock = iter([0.0, 0.0, 0.0])
    p = Progress(4, "a title", Console(file=io.StringIO()), clock=lambda: next(clock))
    with p:
        p.round(1, COHORT)
        p.finish_round(RECORD | {"round": 1})
        p.round(2, COHORT)
        p.client("c0")
        for _ in range(10):
            p.step(1.5)
        p.client("c1")
        for _ in range(5):
            p.step(0.25)
    text = drawn(p._view, 70.0)
    for words in ("2/4", "c1  rank 8", "5/10", "loss 0.250", "1:10", "1:30 left", "✓ c0 r4 1.50", "> c1 r8", "43.8%"):
        assert words in text, text


def test_the_pace_of_a_resumed_run_counts_only_its_own_rounds():
    """Resumed at round 9 of 10, halfway through it after 30 s: 1.5 rounds are left at 60 s each."""
    view = View("a title", 10, 0.0, first=9, index=9, closed=False, cohort=(("c0", 4, 10),), current="c0", steps=5)
    assert view.left(30.0) == pytest.approx(90.0)


def test_no_step_of_a_round_is_counted_beyond_its_plan():
    view = View("a title", 2, 0.0, first=1, index=1, closed=False, cohort=(("c0", 4, 10),), current="c0", steps=99)
    assert view.share == 1.0


@pytest.mark.parametrize("width", [30, 60, 200])
def test_a_hundred_clients_fit_every_width(width):
    cohort = tuple((f"client-{i}", 2 ** (i % 6), 10) for i in range(100))
    done = {f"client-{i}": 1.0 for i in range(50)}
    view = View("t" * 300, 20, 0.0, 1, 2, False, cohort, "client-50", done, losses=(2.0, 1.0), evaluated="e" * 300)
    rows = drawn(view, 5.0, width).splitlines()
    assert len(rows) <= 9
    assert max(map(len, rows)) <= width
    assert width < 60 or any("> client-50" in row for row in rows)


def test_a_running_loss_forgets_and_ignores_what_is_not_a_number():
    p = Progress(1, "a title", Console(file=io.StringIO()))
    p.round(1, COHORT)
    p.client("c0")
    p.step(2.0)
    p.step(1.0)
    p.step(float("nan"))
    p.step()
    assert p._view.loss == pytest.approx(0.8 * 2.0 + 0.2 * 1.0)
    assert p._view.steps == 4


def test_markup_in_a_title_or_an_id_is_text():
    view = View("[red]run[/]", 1, 0.0, 1, 1, False, (("[bold]c0", 4, 1),), "[bold]c0")
    text = drawn(view, 1.0)
    assert "[red]run[/]" in text and "> [bold]c0 r4" in text


def test_silence_takes_every_event_and_lets_errors_pass(capsys):
    tell(Silent())
    with pytest.raises(ValueError), Silent():
        raise ValueError
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_234_567, "1.2 MB"), (999_999, "1.0 MB"), (3.2e14, "320.0 TB")],
)
def test_sizes(count, words):
    assert size(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (9.96, "10 s"), (59.4, "59 s"), (125, "2:05"), (7625, "2:07:05")]
)
def test_spans(seconds, words):
    assert span(seconds) == words


def test_metrics():
    assert [metric("accuracy", 0.5), metric("loss", 2.0), metric("rows", 12000), metric("drift", 1.5e-7)] == [
        "50.0%", "2.000", "12,000", "1.5e-07",
    ]  # fmt: skip


def test_a_sparkline_spans_the_heights():
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert sparkline([1.0, 1.0]) == "▄▄"
    assert len(sparkline(list(range(500)))) == 40
