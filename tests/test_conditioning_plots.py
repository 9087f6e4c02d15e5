"""The picture of the smallest singular values: its lines are the numbers, the thick one the least of them."""

import pytest

from fedllm.reports.plots.conditioning import NAMED, SMALLEST, conditioning
from fedllm.reports.run_record import Story


def told(*rounds: dict[str, float]) -> Story:
    records = tuple({"round": i, "telemetry": {SMALLEST: values}} for i, values in enumerate(rounds, start=1))
    return Story("run", records, {}, {}, {}, (), 0)


def test_the_thick_line_is_the_smallest_of_all_layers():
    """Decades: 0.1, then 0.01, which is another layer's; a zero has no place on a logarithmic axis."""
    figure = conditioning(told({"a": 0.1, "b": 1.0, "c": 0.0}, {"a": 0.1, "b": 0.01, "c": 0.0}))
    assert figure is not None
    *thin, thick = figure.axes[0].get_lines()
    assert list(thick.get_ydata()) == pytest.approx([-1, -2])
    assert [list(line.get_ydata()) for line in thin] == [pytest.approx([-1, -1]), pytest.approx([0, -2])]
    assert {text.get_text() for text in figure.axes[0].texts} == {"a: 0.1", "b: 0.01"}


def test_a_round_without_a_place_on_the_axis_is_a_gap():
    figure = conditioning(told({"a": 0.1, "b": 1.0}, {"a": 0.0, "b": 1.0}, {"a": 0.1, "b": 1.0}))
    assert figure is not None
    assert [list(line.get_xdata()) for line in figure.axes[0].get_lines()] == [[1], [3], [1, 2, 3], [1, 2, 3]]


def test_of_many_layers_the_first_and_the_last_are_named():
    figure = conditioning(told({f"layer {i}": 1.0 + i for i in range(NAMED + 1)}))
    assert figure is not None
    assert {text.get_text() for text in figure.axes[0].texts} == {"layer 0: 1", f"layer {NAMED}: {NAMED + 1}"}


def test_a_run_without_them_has_no_picture():
    assert conditioning(told({}, {})) is None
