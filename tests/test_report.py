import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedllm.errors import FedError
from fedllm.reports import report
from fedllm.reports import run_record as story
from fedllm.reports.plots import clients as client_plots
from fedllm.reports.plots import run as plots
from fedllm.reports.plots import weights as weight_plots
from fedllm.reports.plots.run import draw
from fedllm.reports.report import print_summary, summary_table, write
from fedllm.reports.run_record import records_in

SUMMARY = {
    "title": "Demo",
    "rows": [
        {"name": "base model", "loss": 1.91, "exact_match": 0.0125},
        {"name": "federated (fedhl)", "loss": 0.52, "exact_match": 0.5875},
        {"name": "client c0 alone", "loss": 0.95, "exact_match": 0.296875, "steps": 50},
    ],
    "notes": ["80 held-out problems."],
}
RECIPE = """
run: {rounds: 2, seed: 0, output: runs/demo, resume: false, command: fedllm train recipe=demo run.rounds=2}
algorithm: {name: fedhl, epsilon: 1.0e-06}
model: {name: pico, revision: null}
"""


def a_round(index: int, rounds: int, ranks: dict[str, int]) -> dict[str, Any]:
    loss = 0.4 + 1.5 * math.exp(-3 * index / rounds)
    clients = {
        id: {
            "rank": rank, "rows": 100 + 7 * place, "steps": 10, "tokens": 3456, "seconds": 3.0,
            "train_loss": loss + 1 / rank + place / 999, "bytes_down": 1000 * rank, "bytes_up": 900 * rank,
        }
        for place, (id, rank) in enumerate(ranks.items())
    }  # fmt: skip
    return {
        "round": index,
        "train_loss": loss,
        "weights": {id: rank / sum(ranks.values()) for id, rank in ranks.items()},
        "truncation_error": {id: index / rank for id, rank in ranks.items()},
        "bytes_down": 1000 * sum(ranks.values()),
        "bytes_up": 900 * sum(ranks.values()),
        "seconds": 42.0,
        "clients": clients,
        "eval": {"loss": loss + 0.1, "exact_match": index / (2 * rounds)} if index % 2 == 0 or index == rounds else {},
        "refused": {"c1": "NaN in q_proj.A"} if index == 1 else {},
        "telemetry": {"drift": dict.fromkeys(ranks, 0.1 * index), "kept_rank": 8.0 + index, "served_error": 0.25},
    }


def make_run(run: Path, rounds: int, clients: int, labels: int = 3) -> Path:
    """A folder as a run of ``rounds`` rounds with ``clients`` clients of ranks 4, 8, 16 and 32 leaves it."""
    ranks = {f"c{i}": 4 * 2 ** (i % 4) for i in range(clients)}
    run.mkdir(parents=True)
    lines = [json.dumps(a_round(index, rounds, ranks)) for index in range(1, rounds + 1)]
    (run / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    (run / "recipe.yaml").write_text(RECIPE)
    split = {
        id: {"rows": 100 + 7 * i, "rank": rank, "labels": {f"kind {j}": 10 + (i * j) % 30 for j in range(labels)}}
        for i, (id, rank) in enumerate(ranks.items())
    }
    (run / "partition.json").write_text(
        json.dumps({"clients": split, "dropped_rows": 3, "seed": 7, "kind": "dirichlet"})
    )
    return run


def words(run: Path) -> str:
    return report.text(report.read(run), [])


def rows_under(text: str, heading: str) -> list[list[str]]:
    """The body of the first table under a heading."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    table = re.search(r"(?:^\|.*\n?)+", section, re.M)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.group().splitlines()[2:]]


def everything(run: Path) -> str:
    return write(run).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("rounds", "clients", "labels"), [(1, 4, 3), (2, 1, 0), (20, 4, 1), (1, 100, 3), (34, 100, 12)]
)
def test_every_shape_of_run_gets_a_report_whose_links_resolve_and_small_plots(tmp_path, rounds, clients, labels):
    run = make_run(tmp_path / "demo", rounds, clients, labels)
    text = everything(run)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert {f"plots/{name}.png" for name in ("learning", "clients", "data", "ranks", "traffic", "telemetry")} <= set(
        links
    )
    for link in links:
        assert (run / link).is_file(), link
    for plot in (run / "plots").iterdir():
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert 5_000 < plot.stat().st_size < 150_000, plot


def test_the_report_says_what_happened(tmp_path):
    text = words(make_run(tmp_path / "demo", 2, 4))
    assert text.startswith(
        "# Demo\n\n2 rounds · 4 clients of ranks 4 to 32 · `fedhl` · `pico` · in 1:24 · 120 kB down · 108 kB up"
    )
    assert "Federated against the base model: loss -1.390, exact match +57.5 points." in text
    assert "- 80 held-out problems." in text
    assert "Data split: dirichlet, seed 7, 3 rows cut off by max_length." in text
    assert rows_under(text, "Rounds") == [
        ["1", "0.735", "–", "–", "4", "60.0 kB", "54.0 kB", "42 s"],
        ["2", "0.475", "0.575", "50.0%", "4", "60.0 kB", "54.0 kB", "42 s"],
    ]
    assert rows_under(text, "Who trained what")[1] == [
        "c1", "8", "107", "2", "20", "6,912", "13.3%", "0.601", "16.0 kB", "14.4 kB",
    ]  # fmt: skip
    assert rows_under(text, "Refused updates") == [["1", "c1", "NaN in q\\_proj.A".replace("\\_", "_")]]
    assert ["algorithm", "name `fedhl` · epsilon `1e-06`"] in rows_under(text, "Settings")
    assert "```sh\nfedllm train recipe=demo run.rounds=2\n```" in text


def test_clients_own_models_in_a_box_for_all_and_one_a_level(tmp_path):
    """b2: 20 and 60 %, mean 40; b4: 90 %, from its last round; all: 170 / 3 = 56.7 %."""
    run, levels = make_run(tmp_path / "demo", 2, 3), {"c0": "b2", "c1": "b4", "c2": "b2"}
    scores = [{"c0": 0.1, "c1": 0.9, "c2": 0.6}, {"c0": 0.2}]
    split = {id: {"rows": 5, "rank": 0, "level": level} for id, level in levels.items()}
    (run / "partition.json").write_text(json.dumps({"clients": split}))
    records = [
        {
            "round": i,
            "clients": {id: {"own_accuracy": v} for id, v in of.items()},
            "eval": {"own_accuracy": 0.5},
            "flops": 1.5e9,
        }
        for i, of in enumerate(scores, start=1)
    ]
    (run / "rounds.jsonl").write_text("\n".join(map(json.dumps, records)))
    text = everything(run)
    assert "3 clients of level b2, b4" in text and "3 GFLOP of training" in text and "(plots/own.png)" in text
    assert rows_under(text, "Clients' own models") == [
        ["all 3", "56.7% (20.0% to 90.0%)"],
        ["2 of b2", "40.0% (20.0% to 60.0%)"],
        ["1 of b4", "90.0% (90.0% to 90.0%)"],
    ]
    (ax,) = client_plots.own(story.read(run)).axes
    points = [sorted(line.get_ydata()) for line in ax.get_lines() if line.get_marker() == "o"]
    assert points == [[0.2, 0.6, 0.9], [0.2, 0.6], [0.9]]
    assert ax.get_title() == "Accuracy of each client's own model, by level"
    assert rows_under(text, "Who trained what")[0][1] == "b2"


def test_a_long_run_of_many_clients_is_condensed(tmp_path):
    text = words(make_run(tmp_path / "demo", 40, 100))
    told = [int(row[0]) for row in rows_under(text, "Rounds")]
    assert len(told) <= 14 and told == sorted(set(told)) and told[0] == 1 and told[-1] == 40
    assert f"{40 - len(told)} more rounds are in" in text
    ranks = rows_under(text, "Who trained what")
    assert [row[0] for row in ranks] == [f"25 of rank {rank}" for rank in (4, 8, 16, 32)]
    assert ranks[0][3] == "10,000"  # steps: 25 clients, 40 rounds, 10 each
    assert len(re.findall(r"^\| c\d+ \| \d+ \|", text, re.M)) == 100
    assert text.index("| c2 |") < text.index("| c10 |")


def test_a_run_cut_off_in_the_middle_of_a_line_is_told_up_to_there(tmp_path):
    run = make_run(tmp_path / "demo", 3, 4)
    whole = (run / "rounds.jsonl").read_text()
    (run / "rounds.jsonl").write_text(whole[:-60])
    text = words(run)
    assert [row[0] for row in rows_under(text, "Rounds")] == ["1", "2"]
    assert "1 line of rounds.jsonl could not be read." in text


def test_rounds_run_again_after_a_resume_count_once_the_last_record_wins(tmp_path):
    path = tmp_path / "rounds.jsonl"
    path.write_text(
        '{"round": 2, "train_loss": 9}\n{"round": 1}\n\n{"round": 2, "train_loss": 3}\n[1]\n{"round": Infinity}\n'
    )
    records, unreadable = records_in(path)
    assert records == [{"round": 1}, {"round": 2, "train_loss": 3}]
    assert unreadable == 2


def test_one_bare_record_is_enough(tmp_path):
    (tmp_path / "rounds.jsonl").write_text('{"round": 1}')
    text = everything(tmp_path)
    assert text.startswith(f"# {tmp_path.name}\n\n1 round · 0 clients\n\n## Rounds")
    assert list((tmp_path / "plots").iterdir()) == []


def test_a_plot_whose_numbers_are_gone_is_removed_and_the_rest_is_the_same_bytes(tmp_path):
    run = make_run(tmp_path / "demo", 2, 4)
    text = everything(run)
    plots = {plot.name: plot.read_bytes() for plot in (run / "plots").iterdir()}
    assert everything(run) == text
    assert {plot.name: plot.read_bytes() for plot in (run / "plots").iterdir()} == plots
    (run / "partition.json").unlink()
    bare = [json.dumps({"round": 1, "train_loss": 1.0})]
    (run / "rounds.jsonl").write_text("\n".join(bare))
    assert "telemetry" not in everything(run)
    assert [plot.name for plot in (run / "plots").iterdir()] == ["learning.png"]


def test_text_from_the_files_stays_text(tmp_path):
    run = make_run(tmp_path / "demo", 2, 4)
    bad = "<script>|$x_{$ ![](http://evil) `]*\nNaN 病院"
    record = a_round(1, 2, {bad: 4, "ok": 8}) | {"refused": {bad: bad}, "telemetry": {bad: {bad: 1.0}}}
    (run / "rounds.jsonl").write_text(json.dumps(record))
    (run / "summary.json").write_text(json.dumps({"title": bad, "rows": [{"name": bad, "loss": 1}], "notes": [bad]}))
    split = {bad: {"rows": 5, "rank": 4, "labels": {bad: 3, "b": 2}}}
    (run / "partition.json").write_text(json.dumps({"clients": split, "kind": bad}))
    (run / "recipe.yaml").write_text(json.dumps({"run": {"command": "a ```` b"}, bad: {bad: bad}}))
    text = words(run)
    outside = re.sub(r"`[^`]*`", "", text.split("## Command")[0].replace("\\`", ""))
    assert not re.search(r"(?<!\\)<script", outside) and not re.search(r"(?<!\\)\[\]\(http", outside)
    for heading, columns in (("Result", 2), ("Refused updates", 3), ("Who trained what", 10)):
        section = text.split(f"## {heading}\n")[1]
        line = next(line for line in section.splitlines() if "script" in line and line.startswith("|"))
        assert len(re.split(r"(?<!\\)\|", line)) == columns + 2, line
    assert "`````sh\na ```` b\n`````" in text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("train_loss", "weights", "truncation_error", "bytes_down", "seconds", "clients", "eval", "refused", "telemetry")
RECORDS = st.lists(
    st.fixed_dictionaries({"round": st.integers(1, 50)}, optional=dict.fromkeys(KEYS, JSON)), min_size=1, max_size=3
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=RECORDS, summary=JSON, partition=JSON, recipe=JSON)
def test_no_file_makes_the_words_crash(tmp_path, records, summary, partition, recipe):
    (tmp_path / "rounds.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "summary.json").write_text(
        json.dumps({"rows": [summary, {"name": summary, "loss": summary}], "notes": summary})
    )
    (tmp_path / "partition.json").write_text(json.dumps({"clients": partition, "seed": partition, "kind": partition}))
    (tmp_path / "recipe.yaml").write_text(json.dumps({"run": {"command": recipe}, "algorithm": recipe}))
    story = report.read(tmp_path)
    assert report.text(story, []).startswith("# ")
    print_summary(story.summary, Console(file=io.StringIO()))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e99, -1e99, 1e308, 5e-324, 10**400, None, "1.5", [1], {"x": 1}])
def test_no_number_makes_the_plots_crash(tmp_path, value):
    record = a_round(1, 2, {"c0": 4, "c1": 8})
    for key in ("weights", "truncation_error"):
        record[key]["c0"] = value
    record |= {
        "train_loss": value,
        "bytes_down": value,
        "eval": {"loss": value, "exact_match": value},
        "telemetry": {"x": value, "truncation": {"4": value}, "singular_values": {"1": value}, "drift": {"c0": value}},
    }
    record["clients"]["c0"]["train_loss"] = value
    record["clients"]["c1"] = value
    (tmp_path / "rounds.jsonl").write_text("\n".join(map(json.dumps, [record, a_round(2, 2, {"c0": 4, "c2": 8})])))
    (tmp_path / "summary.json").write_text(
        json.dumps({"rows": [{"name": "base model", "loss": value, "exact_match": value}]})
    )
    assert "learning" in draw(report.read(tmp_path), tmp_path / "plots")


def test_the_error_of_what_is_served_is_summed_over_the_rounds(tmp_path):
    """0.25 in each of four rounds: 0.25, 0.5, 0.75, 1 in the panel, under a title in words."""
    figure = plots.telemetry(story.read(make_run(tmp_path / "demo", 4, 4)))
    panel = next(ax for ax in figure.axes if ax.get_title() == plots.TELEMETRY["served_error"].title)
    assert [list(line.get_ydata()) for line in panel.get_lines()] == [[0.25] * 4, [0.25, 0.5, 0.75, 1.0]]


def without(run: Path, index: int, *absent: str) -> Path:
    """The run, had these clients not been drawn in round ``index``."""
    records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for part in ("weights", "truncation_error", "clients"):
        records[index - 1][part] = {id: v for id, v in records[index - 1][part].items() if id not in absent}
    records[index - 1]["telemetry"]["drift"] = dict.fromkeys(records[index - 1]["clients"], 0.1)
    (run / "rounds.jsonl").write_text("\n".join(map(json.dumps, records)))
    return run


def rounds_drawn(ax: Any) -> set[tuple[float, ...]]:
    """The rounds of every stretch of line in a panel."""
    return {tuple(line.get_xdata()) for line in ax.get_lines() if len(line.get_xdata()) and line.get_linestyle() == "-"}


@pytest.mark.parametrize(("clients", "absent"), [(4, ["c1"]), (12, ["c1", "c5", "c9"])])
def test_no_line_crosses_a_round_in_which_no_client_of_its_kind_took_part(tmp_path, clients, absent):
    """Rank 8 is away in round 3 of 5: wherever clients or ranks have lines, one ends at 2 and goes on at 4."""
    told = story.read(without(make_run(tmp_path / "demo", 5, clients), 3, *absent))
    panels = [*client_plots.clients(told).axes, *plots.telemetry(told).axes[:1], *weight_plots.ranks(told).axes[::2]]
    assert [ax.get_title() for ax in panels] == [
        "Train loss of each client, by rank", "Drift of one client in a round, by rank",
        "Weight of one client, by rank", "Truncation error, by rank",
    ]  # fmt: skip
    for ax in panels:
        assert {line for line in rounds_drawn(ax) if line != (0, 1)} == {(1, 2, 3, 4, 5), (1, 2), (4, 5)}, (
            ax.get_title()
        )


def test_many_clients_drift_is_the_mean_of_each_rank_in_a_band(tmp_path):
    """Nine clients: ranks 4, 8, 16, 32 have 3, 2, 2, 2; those of rank 4 moved 0, 4 and 8."""
    run = make_run(tmp_path / "demo", 1, 9)
    record = json.loads((run / "rounds.jsonl").read_text())
    record["telemetry"] = {"drift": {f"c{i}": float(i) for i in range(9)}}
    (run / "rounds.jsonl").write_text(json.dumps(record))
    (ax,) = plots.telemetry(story.read(run)).axes
    assert [line.get_ydata()[0] for line in ax.get_lines()] == [4.0, 3.0, 4.0, 5.0]
    assert [band.get_datalim(ax.transData).intervaly.tolist() for band in ax.collections][0] == [0.0, 8.0]
    assert [text.get_text() for text in ax.texts] == ["rank 8", "rank 4", "rank 16", "rank 32"]
    assert ax.get_ylabel() == "norm of its step\n(mean; band: from least to most)"


def test_telemetry_says_what_its_numbers_are(tmp_path):
    run = make_run(tmp_path / "demo", 2, 4)
    measured = {"served_error": 2e-7, "truncation": {"1": 0.443, "8": 0.0}, "singular_values": {"1": 0.5, "4": 0.002}}
    records = [a_round(i, 2, {"c0": 4, "c1": 8}) | {"telemetry": measured} for i in (1, 2)]
    (run / "rounds.jsonl").write_text("\n".join(map(json.dumps, records)))
    served, truncation, values = plots.telemetry(story.read(run)).axes
    told = [{text.get_text() for text in ax.texts} for ax in (served, truncation, values)]
    assert told == [
        {"in the round: < 0.001%", "added up so far: < 0.001%"},
        {"rank 1: 44.3%", "rank 8: 0%"},
        {"place 1: 0.500", "place 4: 0.002"},
    ]
    assert served.get_ylim()[1] >= 1e-3, "rounding errors look like errors"
    assert truncation.get_ylabel() == "share of its norm"
    assert values.get_yscale() == "log"


@pytest.mark.parametrize("clients", [3, 30])
def test_rows_are_counted_in_whole_numbers(tmp_path, clients):
    run = make_run(tmp_path / "demo", 1, clients, labels=0)
    split = {f"c{i}": {"rows": 2 + i % 2, "rank": 4} for i in range(clients)}
    (run / "partition.json").write_text(json.dumps({"clients": split}))
    text = everything(run)
    assert "![Rows of each client, by label where they have labels](plots/data.png)" in text
    (ax,) = client_plots.data(story.read(run)).axes
    ticks = (ax.yaxis if clients == 30 else ax.xaxis).get_majorticklocs()
    assert len(ticks) > 2 and all(tick == int(tick) for tick in ticks)
    assert ax.get_title() == "Rows of each client"


def test_where_all_models_look_the_same_none_is_the_best():
    rows = [{"name": "base", "loss": 2.0, "exact_match": 0.0}, {"name": "ours", "loss": 1.0, "exact_match": 0.0001}]
    assert summary_table({"rows": rows}).splitlines()[2:] == ["| base | 2.000 | 0.0% |", "| ours | **1.000** | 0.0% |"]


def test_clients_that_were_never_drawn_are_told_apart(tmp_path):
    run = without(make_run(tmp_path / "demo", 1, 20), 1, "c3")
    assert "\n\n1 round · 19 of 20 clients took part, of ranks 4 to 32 · " in words(run)
    assert weight_plots.ranks(story.read(run)).axes[1].get_xlabel() == "19 of 20 clients were averaged"


def test_the_two_losses_of_a_round_are_told_apart(tmp_path):
    run = make_run(tmp_path / "demo", 2, 4)
    assert report.TIMES in words(run) and report.IDEAL in words(run)
    (run / "rounds.jsonl").write_text('{"round": 1, "train_loss": 1.0}')
    assert report.TIMES not in words(run) and report.IDEAL not in words(run)


def test_drawing_leaves_matplotlib_as_it_was_and_makes_no_pyplot(tmp_path):
    before = dict(matplotlib.rcParams)
    run = make_run(tmp_path / "demo", 1, 4)
    write(run)
    assert dict(matplotlib.rcParams) == before
    program = "import sys; from pathlib import Path; from fedllm.reports.report import write; write(Path(sys.argv[1]));"
    program += "sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program, str(run)], timeout=120).returncode == 0


def test_a_folder_without_rounds_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(FedError, match=r"no rounds\.jsonl.*run\.output"):
        write(tmp_path)
    (tmp_path / "rounds.jsonl").write_text('{"round": ')
    with pytest.raises(FedError, match="no finished round"):
        write(tmp_path)
    assert not (tmp_path / "report.md").exists() and not (tmp_path / "plots").exists()


def test_the_summary_puts_the_best_in_bold_where_better_has_a_meaning():
    assert summary_table(SUMMARY).splitlines() == [
        "|  | loss | exact match | steps |",
        "| --- | ---: | ---: | ---: |",
        "| base model | 1.910 | 1.2% | – |",
        "| federated (fedhl) | **0.520** | **58.8%** | – |",
        "| client c0 alone | 0.950 | 29.7% | 50 |",
    ]
    assert summary_table({}) == ""


def test_the_summary_on_a_terminal_has_every_number_and_note():
    console = Console(file=io.StringIO(), width=100, record=True)
    print_summary(SUMMARY, console)
    shown = console.export_text()
    for words in ("Demo", "base model", "0.520", "58.8%", "29.7%", "50", "80 held-out problems."):
        assert words in shown
    print_summary({"rows": [{"name": "[red]x[/]", "loss": 1}]}, console)
    assert "[red]x[/]" in console.export_text()
