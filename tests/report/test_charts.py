"""Charts as files: what is drawn is what the table holds, and series differ by more than colour."""

import re

from switchcli.report import charts
from switchcli.report.charts import Axis
from switchcli.terminal.table import Table

STEP, VALUE = Axis("step", "steps"), Axis("value", "quality", ".3~f")
CURVES = {"series": ["one"] * 3 + ["other"] * 3, "step": [0.0, 1.0, 2.0] * 2, "value": [1.0, 2.0, 4.0, 2.0, 3.0, 5.0]}
ROWS = [(*point, point[-1], point[-1]) for point in zip(*CURVES.values(), strict=True)]
TABLE = Table(("series", "step", "value", "least", "most"), ROWS, name="curves")


def test_lines_are_drawn_where_the_numbers_are() -> None:
    drawn = charts.svg(charts.lines("a", "A <b>", "", TABLE, STEP, VALUE, ["one", "other"]))
    assert drawn.startswith("<svg")
    assert "A &lt;b&gt;" in drawn
    line = next(path for path in re.findall(r"<path [^>]*>", drawn) if 'stroke="#0072B2"' in path and "L" in path)
    points = [tuple(map(float, point.split(","))) for point in re.search(r' d="M([^"]*)"', line)[1].split("L")]
    assert [x for x, _ in points] == [0, 280, 560]
    heights = [300 - y for _, y in points]
    assert heights[2] - heights[1] == 2 * (heights[1] - heights[0])  # 1, 2, 4


def test_series_differ_without_colour() -> None:
    styles = [charts.style_of(place) for place in range(30)]
    assert len({(dash, shape) for _, dash, shape in styles}) == 30
    assert len(set(styles)) == 30
    drawn = charts.svg(charts.lines("a", "A", "", TABLE, STEP, VALUE, ["one", "other"]))
    assert 'stroke-dasharray="7,3"' in drawn


def test_a_heat_map_has_a_cell_a_row() -> None:
    cells = Table(("expert", "step", "share"), [(0, 10, 0.0), (0, 20, 1.0), (1, 10, 1.5), (1, 20, 2.0)], name="cells")
    figure = charts.load_map("A", cells, (0.0, 2.0))
    drawn = charts.svg(figure)
    colours = re.findall(r'<path aria-label="[^"]*" [^>]*fill="(#[0-9a-f]{6}|rgb[^"]*)"', drawn)
    assert len(colours) == 4
    assert len(set(colours)) == 4
    assert charts.png(figure).startswith(b"\x89PNG")
