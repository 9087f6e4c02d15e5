"""The comparison of runs, on folders made here: every number in the tables is computed by hand beside it."""

import csv
import json
import math
from pathlib import Path

import pytest
import yaml

from fedllm.commands import compare
from fedllm.errors import FedError
from fedllm.reports.compare import plots as compare_plots
from fedllm.reports.compare.runs import Entry, entries_of
from fedllm.reports.compare.significance import Cell, verdict
from fedllm.reports.run_record import Story

RANKS = {"c0": 8, "c1": 2}
NOTHING = Story("", (), {}, {}, {}, (), 0)


def a_run(folder: Path, rule: str, seed: int, losses: list[float], scores: list[float], **more) -> Path:
    """A finished run's folder: ``losses`` and ``scores`` by round, 100 bytes down and 50 up in each."""
    ranks = more.pop("ranks", RANKS)
    total, rows = more.pop("rounds", len(losses)), more.pop("rows", [])
    moved = more.pop("moved", 100)
    folder.mkdir(parents=True)
    recipe = {
        "run": {"rounds": total, "seed": seed, "output": str(folder)},
        "algorithm": {"name": rule},
        "model": {"name": "pico"},
        "data": {"name": "word_problems", **more.pop("data", {})},
        "clients": {"rank": list(ranks.values())},
        **more,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "partition.json").write_text(
        json.dumps({"clients": {c: {"rank": r, "rows": 5} for c, r in ranks.items()}})
    )
    records = [
        {"round": i, "train_loss": 2 * loss, "bytes_down": moved, "bytes_up": moved // 2, "seconds": 1.0,
         "clients": {c: {"rank": r, "rows": 5} for c, r in ranks.items()}, "eval": {"loss": loss, "exact_match": score}}
        for i, (loss, score) in enumerate(zip(losses, scores, strict=True), start=1)
    ]  # fmt: skip
    (folder / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "summary.json").write_text(json.dumps({"rows": rows}))
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Two rules, three seeds; the second rule is the better one by 0.1, 0.2 and 0.3 of the rows."""
    base = [{"name": "base model", "loss": 3.0, "exact_match": 0.0}]
    found = []
    for seed, (one, two) in enumerate([(0.2, 0.3), (0.3, 0.5), (0.4, 0.7)]):
        found.append(a_run(tmp_path / f"a{seed}", "fedit", seed, [2.0, 1.0], [0.1, one], rows=base))
        found.append(a_run(tmp_path / f"b{seed}", "fedhl", seed, [0.9, 0.8], [0.1, two], moved=400))
    return found


def cells_of(page: str, title: str) -> list[list[str]]:
    """The rows of the first table under a heading."""
    lines = page.split(f"## {title}\n")[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    body = [line for line in lines[start:] if line.startswith("|")]
    end = next((i for i, line in enumerate(lines[start:]) if not line.startswith("|")), len(body))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body[:end]]


def test_the_table_by_hand(runs, tmp_path):
    """fedit: 20, 30, 40 % are 30 ± 10; fedhl: 30, 50, 70 % are 50 ± 20. Gaps 10, 20, 30: t = 20 / (10 / sqrt 3)."""
    page = compare.write(runs, tmp_path / "out").read_text()
    table = cells_of(page, "Exact match")
    assert table[0] == ["%", "mean ± std"]
    assert ["fedit", "30.0 ± 10.0"] in table and ["fedhl", "**50.0 ± 20.0**"] in table
    assert ["_base model_", "0.0 ± 0.0"] in table
    # with two degrees of freedom the t distribution is in closed form: 2 sf(t) = 1 - t / sqrt(2 + t^2)
    t = math.sqrt(12)
    assert f"paired t-test over 3 seeds, p = {1 - t / math.sqrt(2 + t * t):.2g}), not significant" in page
    assert "With 3 seeds a test has next to no power" in page
    loss = cells_of(page, "Loss")
    assert ["fedhl", "**0.800 ± 0.000**"] in loss and ["fedit", "1.000 ± 0.000"] in loss


def test_less_perplexity_is_better_and_the_loss_is_what_is_reached(tmp_path):
    """Two rules of losses 1 and 2: e^1 is the better perplexity, and both reached the loss of 2."""
    runs = []
    for rule, loss in (("fedlmt", 1.0), ("fedavg", 2.0)):
        run = a_run(tmp_path / rule, rule, 0, [3.0, loss], [0.0, 0.0])
        records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
        scores = [
            {"perplexity": math.exp(r["eval"]["loss"]), "masked_accuracy": 0.1, "loss": r["eval"]["loss"]}
            for r in records
        ]
        lines = (json.dumps(r | {"eval": found}) + "\n" for r, found in zip(records, scores, strict=True))
        (run / "rounds.jsonl").write_text("".join(lines))
        runs.append(run)
    page = compare.write(runs, tmp_path / "out", "perplexity").read_text()
    perplexity = cells_of(page, "Perplexity")
    assert ["fedlmt", f"**{math.exp(1):.3f}**"] in perplexity and ["fedavg", f"{math.exp(2):.3f}"] in perplexity
    assert cells_of(page, "Cost of a score")[0][0] == "loss at most 2"


def test_ten_rules_have_ten_looks():
    names = [f"rule {i}" for i in range(10)]
    entries = [Entry(Path(name), NOTHING, name, "", "", 0, False) for name in names]
    looks = {(compare_plots.colors_of(entries)[name], compare_plots.dashes(names)[name]) for name in names}
    assert len(looks) == 10


def test_the_cost_of_a_score_by_hand(runs, tmp_path):
    """The loss all reached is 1.0: fedit after round 2, 2 * 150 bytes; fedhl after round 1, 600 bytes."""
    page = compare.write(runs, tmp_path / "out").read_text()
    assert cells_of(page, "Cost of a score") == [
        ["loss at most 1", "rounds", "bytes"], ["---", "---:", "---:"], ["fedit", "2", "300 B"], ["fedhl", "1", "600 B"]
    ]  # fmt: skip
    page = compare.write(runs, tmp_path / "out", target="exact_match=0.3").read_text()
    # fedit reaches 30 % with seeds 1 and 2, after two rounds; fedhl always, after two rounds of 600 bytes
    assert cells_of(page, "Cost of a score")[2:] == [["fedit", "2 (2 of 3 seeds)", "300 B"], ["fedhl", "2", "1.2 kB"]]
    page = compare.write(runs, tmp_path / "out", target="exact_match=0.9").read_text()
    assert cells_of(page, "Cost of a score")[2:] == [["fedit", "never", "–"], ["fedhl", "never", "–"]]


def test_the_csv_files_have_the_same_numbers(runs, tmp_path):
    compare.write(runs, tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out/compare.csv").open()))
    (best,) = [row for row in rows if row["metric"] == "exact_match" and row["best"] == "True"]
    assert (
        best["method"] == "fedhl"
        and float(best["mean"]) == pytest.approx(0.5)
        and float(best["std"]) == pytest.approx(0.2)
    )
    each = list(csv.DictReader((tmp_path / "out/runs.csv").open()))
    assert len(each) == 6 and {row["bytes"] for row in each} == {"300.0", "1200.0"}
    assert [float(row["exact_match"]) for row in each if row["method"] == "fedit"] == [0.2, 0.3, 0.4]


def test_settings_are_columns_and_have_an_average(tmp_path):
    """One seed: fedhl 10 and 30 %, mean 20; fedit 30 and 50 %, mean 40."""
    runs = [
        a_run(tmp_path / f"{rule}{rank}", rule, 0, [1.0], [score], ranks={"c0": rank, "c1": 2})
        for rule, scores in {"fedhl": (0.1, 0.3), "fedit": (0.3, 0.5)}.items()
        for rank, score in zip((8, 4), scores, strict=True)
    ]
    page = compare.write(runs, tmp_path / "out").read_text()
    assert cells_of(page, "Exact match") == [
        ["%", "clients.rank \\[8, 2\\]", "clients.rank \\[4, 2\\]", "average"], ["---", "---:", "---:", "---:"],
        ["fedhl", "10.0", "30.0", "20.0"], ["fedit", "**30.0**", "**50.0**", "**40.0**"],
    ]  # fmt: skip
    assert "(no test: one seed)." in page and "With 1 seed a test" in page
    drawn = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert drawn == {
        f"{kind}_{i}_clients_rank_{r}_2.png" for kind in ("curves", "trade_off") for i, r in ((1, 8), (2, 4))
    }


def test_a_paper_s_table_of_profiles_and_tasks(tmp_path):
    """Tasks with different scores: of each its first, and the average over the tasks of a profile: (20 + 40) / 2."""
    sheet = {}
    for profile, gain in (("moderate", 0.1), ("high", 0.0)):
        for task, key, score in (("GSM8K", "exact_match", 0.2), ("Dolly", "rouge_l", 0.4)):
            for rule, more in (("fedhl", gain), ("fedit", 0.05)):
                name = f"{profile}_{task}_{rule}"
                run = a_run(tmp_path / name, rule, 0, [1.0], [score + more], data={"name": task})
                (run / "rounds.jsonl").write_text((run / "rounds.jsonl").read_text().replace("exact_match", key))
                sheet[name] = {"profile": profile, "task": task, "rule": rule}
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": sheet}))
    table = cells_of(compare.write([tmp_path], tmp_path / "out").read_text(), "Exact match or rouge l")
    assert table[0][1:] == [
        "moderate, GSM8K", "moderate, Dolly", "moderate, average", "high, GSM8K", "high, Dolly", "high, average",
    ]  # fmt: skip
    assert table[2] == ["fedhl", "**30.0**", "**50.0**", "**40.0**", "20.0", "40.0", "30.0"]
    assert table[3] == ["fedit", "25.0", "45.0", "35.0", "**25.0**", "**45.0**", "**35.0**"]


def test_a_sweep_s_labels_are_the_rows_and_the_pooled_run_is_a_baseline(tmp_path):
    a_run(tmp_path / "x", "fedit", 0, [1.0], [0.1])
    a_run(tmp_path / "y", "fedit", 0, [1.0], [0.2], worker={"steps": 3})
    a_run(tmp_path / "z", "fedit", 0, [0.5], [0.9], ranks={"c0": 8})
    runs = {
        name: {"rule": label, "run.seed": "0"} for name, label in (("x", "plain"), ("y", "longer"), ("z", "pooled"))
    }
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": runs}))
    page = compare.write([tmp_path], tmp_path / "out").read_text()
    table = cells_of(page, "Exact match")[2:]
    assert table == [["plain", "10.0"], ["longer", "**20.0**"], ["_all data in one place_", "90.0"]]
    alone = compare.write([tmp_path / "x", tmp_path / "y"], tmp_path / "out").read_text()
    assert cells_of(alone, "Exact match")[2:] == [["plain", "10.0"], ["longer", "**20.0**"]]


def test_all_data_in_one_place_is_held_against_its_own_task(tmp_path):
    for task, score in (("gsm8k", 0.1), ("dolly", 0.3)):
        a_run(tmp_path / task, "fedhl", 0, [1.0], [score], data={"name": task})
        a_run(tmp_path / f"{task}_all", "fedit", 0, [1.0], [2 * score], data={"name": task}, ranks={"c0": 8})
    a_run(tmp_path / "more", "fedhl", 0, [1.0], [0.4], data={"name": "dolly"}, worker={"steps": 2})
    sheet = {"gsm8k": "A", "gsm8k_all": "A", "dolly": "B", "dolly_all": "B", "more": "C"}
    runs = {name: {"rule": name[-3:] == "all" and "pooled" or "fedhl", "task": task} for name, task in sheet.items()}
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": runs}))
    table = cells_of(compare.write([tmp_path], tmp_path / "out").read_text(), "Exact match")
    assert table[0] == ["%", "A", "B", "C", "average"]
    assert table[3] == ["_all data in one place_", "20.0", "60.0", "60.0", "–"]


def test_scores_of_clients_by_rank(tmp_path):
    """Rank 8's client alone has 10 %, rank 2's 30 %: mean 20, best 30. Their own models after the run: 40 and 20 %."""
    rows = [
        {"name": "client c0, its own model", "loss": 1.0, "exact_match": 0.4},
        {"name": "client c1, its own model", "loss": 1.0, "exact_match": 0.2},
        {"name": "client c0 alone", "loss": 1.0, "exact_match": 0.1},
        {"name": "client c1 alone, as many steps", "loss": 1.0, "exact_match": 0.3},
    ]
    page = compare.write([a_run(tmp_path / "x", "fedhl", 0, [1.0], [0.5], rows=rows)], tmp_path / "out").read_text()
    assert cells_of(page, "Clients by rank") == [
        ["exact match, over clients and seeds", "rank 8", "rank 2"], ["---", "---:", "---:"],
        ["fedhl, each client's own model", "40.0", "20.0"], ["fedhl, each client alone", "10.0", "30.0"],
    ]  # fmt: skip
    assert ["_a client alone, mean of 2_", "20.0"] in cells_of(page, "Exact match")
    assert ["_the best client alone_", "30.0"] in cells_of(page, "Exact match")
    assert (tmp_path / "out/clients.png").is_file()


def a_private_run(folder: Path, rule: str, own: dict[str, list[float]], flops: float, levels: dict[str, str]) -> Path:
    """Clients with networks of their own: ``own`` accuracy by client and round (NaN where it was not drawn)."""
    rounds = max(map(len, own.values()))
    run = a_run(folder, rule, 0, [1.0] * rounds, [0.0] * rounds, ranks=dict.fromkeys(own, 0))
    split = {id: {"rank": 0, "rows": 5, "level": level} for id, level in levels.items()}
    (run / "partition.json").write_text(json.dumps({"clients": split}))
    records, last = [], {}
    for i, line in enumerate((run / "rounds.jsonl").read_text().splitlines()):
        scores = {id: {"own_accuracy": course[i]} for id, course in own.items() if not math.isnan(course[i])}
        last |= {id: score["own_accuracy"] for id, score in scores.items()}
        mean = sum(last.values()) / len(last)
        records.append(json.loads(line) | {"clients": scores, "eval": {"own_accuracy": mean}, "flops": flops})
    (run / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


@pytest.fixture
def private(tmp_path) -> list[Path]:
    """Two rules, two levels of two clients; c3 was drawn in the first round only."""
    levels = {"c0": "cnn1", "c1": "cnn2", "c2": "cnn1", "c3": "cnn2"}
    one = {"c0": [0.2, 0.6], "c1": [0.2, 0.8], "c2": [0.4, 1.0], "c3": [0.4, math.nan]}
    two = {id: [score / 2 for score in course] for id, course in one.items()}
    return [
        a_private_run(tmp_path / "a", "standalone", one, 1.5e9, levels),
        a_private_run(tmp_path / "b", "fedlora", two, 3e9, levels),
    ]


def test_clients_own_models_by_level(private, tmp_path):
    """cnn1: (.6 + 1) / 2 = 80 ± 28.3; cnn2: (.8 + .4) / 2 = 60 ± 28.3, c3's score being that of round 1."""
    page = compare.write(private, tmp_path / "out").read_text()
    assert cells_of(page, "Clients by level") == [
        ["own accuracy, over clients and seeds", "cnn2", "cnn1"], ["---", "---:", "---:"],
        ["standalone, each client's own model", "60.0 ± 28.3", "80.0 ± 28.3"],
        ["fedlora, each client's own model", "30.0 ± 14.1", "40.0 ± 14.1"],
    ]  # fmt: skip
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {"boxes", "clients", "curves", "trade_off"}
    for name in ("boxes", "clients", "curves", "trade_off"):
        assert f"({name}.png)" in page


def test_flops_to_a_score_by_hand(private, tmp_path):
    """Means over the clients' last scores, standalone: 30, then 70 %; fedlora half of it, at twice the FLOPs."""
    page = compare.write(private, tmp_path / "out", target="own_accuracy=0.3").read_text()
    assert cells_of(page, "Cost of a score") == [
        ["own accuracy at least 30 %", "rounds", "bytes", "FLOPs"], ["---", "---:", "---:", "---:"],
        ["standalone", "1", "150 B", "1.5 G"], ["fedlora", "2", "300 B", "6 G"],
    ]  # fmt: skip
    assert "FLOPs are those of the clients' training" in page
    rows = list(csv.DictReader((tmp_path / "out/runs.csv").open()))
    assert {row["method"]: float(row["flops"]) for row in rows} == {"standalone": 3e9, "fedlora": 6e9}


def test_a_box_a_rule_and_a_point_a_client(private):
    entries, _ = entries_of(private)
    colors = compare_plots.colors_of(entries)
    (ax,) = compare_plots.own(entries, ["own_accuracy"], colors).axes
    points = [sorted(line.get_ydata()) for line in ax.get_lines() if line.get_marker() == "o"]
    assert points == [[0.4, 0.6, 0.8, 1.0], [0.2, 0.3, 0.4, 0.5]]
    means = [line.get_ydata()[0] for line in ax.get_lines() if line.get_marker() == "+"]
    assert means == pytest.approx([0.7, 0.35])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["standalone", "fedlora"]


def test_a_point_a_rule_at_what_its_score_cost(private):
    entries, _ = entries_of(private)
    axes = compare_plots.trade_off(entries, "own_accuracy", "", compare_plots.colors_of(entries)).axes
    found = [[line.get_xydata()[0].tolist() for line in ax.get_lines() if line.get_marker() == "o"] for ax in axes]
    assert found[0] == [pytest.approx([300, 0.7]), pytest.approx([300, 0.35])]
    assert found[1] == [pytest.approx([3e9, 0.7]), pytest.approx([6e9, 0.35])]


def test_a_rule_that_sends_nothing_is_a_line_across(private):
    """A logarithm has no place for 0 bytes: the line is at its score, 70 %, and the other rule is the one point."""
    records = [json.loads(line) for line in (private[0] / "rounds.jsonl").read_text().splitlines()]
    silent = [record | {"bytes_down": 0, "bytes_up": 0} for record in records]
    (private[0] / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in silent))
    entries, _ = entries_of(private)
    ax, _ = compare_plots.trade_off(entries, "own_accuracy", "", compare_plots.colors_of(entries)).axes
    assert [line.get_ydata()[0] for line in ax.get_lines() if line.get_linestyle() == ":"] == [pytest.approx(0.7)]
    assert [line.get_xydata()[0][0] for line in ax.get_lines() if line.get_marker() == "o"] == [300]
    assert "standalone: none" in [text.get_text() for text in ax.texts]


def test_unfinished_runs_are_left_out_and_said(runs, tmp_path):
    a_run(tmp_path / "half", "flora", 0, [1.0], [0.1], rounds=3)
    page = compare.write([*runs, tmp_path / "half"], tmp_path / "out").read_text()
    assert "half is not finished: 1 of 3 rounds" in page and "flora" not in page.split("Left out")[0]
    with pytest.raises(FedError, match="no finished run"):
        compare.write([tmp_path / "half"], tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "rouge"}, "common scores are"),
        ({"target": "loss=low"}, "METRIC=VALUE"),
        ({"target": "rouge=1"}, "METRIC=VALUE"),
    ],
)
def test_a_wrong_score_is_one_sentence(runs, tmp_path, arguments, message):
    with pytest.raises(FedError, match=message):
        compare.write(runs, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_the_same_run_twice_is_not_two_seeds(runs, tmp_path):
    again = a_run(tmp_path / "again", "fedhl", 0, [0.9, 0.8], [0.1, 0.3])
    with pytest.raises(FedError, match="same rule, setting and seed"):
        compare.write([*runs, again], tmp_path / "out")
    with pytest.raises(FedError, match="is no folder"):
        compare.write([tmp_path / "nothing"], tmp_path / "out")


def test_verdicts():
    tied = verdict({"a": Cell({0: 0.5}), "b": Cell({0: 0.5})}, "exact_match")
    assert tied.gap == 0 and tied.p is None
    # no shared seed: Welch. Means 0.2 and 0.6, both with variance 0.02 of two: t = 0.4 / sqrt(0.02), 2 degrees
    welch = verdict({"a": Cell({0: 0.1, 1: 0.3}), "b": Cell({2: 0.5, 3: 0.7})}, "exact_match")
    t = 0.4 / math.sqrt(0.02)
    assert welch.best == "b" and welch.p == pytest.approx(1 - t / math.sqrt(2 + t * t)) and "Welch" in welch.test
    # the same gap with every seed: no spread to test against
    constant = verdict({"a": Cell({0: 1.0, 1: 2.0}), "b": Cell({0: 2.0, 1: 3.0})}, "loss")
    assert constant.best == "a" and constant.gap == -1 and constant.p is None and "no test" in constant.test
    assert verdict({"a": Cell({0: 1.0})}, "loss") is None


def test_the_best_is_starred_where_it_is_significant(tmp_path):
    """Gaps of 20, 21, 22 points: t = 21 / (1 / sqrt 3) = 36, p < 0.001."""
    runs = []
    for seed in range(3):
        runs.append(a_run(tmp_path / f"a{seed}", "fedit", seed, [1.0], [0.2]))
        runs.append(a_run(tmp_path / f"b{seed}", "fedhl", seed, [1.0], [0.4 + 0.01 * seed]))
    table = cells_of(compare.write(runs, tmp_path / "out").read_text(), "Exact match")
    assert ["fedhl", "**41.0 ± 1.0**\\*"] in table and ["fedit", "20.0 ± 0.0"] in table
