"""Charts as Vega-Lite specifications with the values they show, for a page and as SVG, PNG and CSV files.

A specification is a dict without data: `Figure.table` holds the data, and several figures may share one table. Lines
differ in color, dash and marker at once, and heat maps differ in lightness, so that no chart depends on color vision.
The colors are those of Okabe and Ito without yellow and black, darker for a white background and lighter for a dark
one, so that every line has a contrast of at least 4.5 to 1.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from switchcli.errors import RecipeError, disk_errors
from switchcli.system import publish
from switchcli.terminal.table import Table

COLORS = ("#0072B2", "#B84A00", "#00795A", "#A84A80", "#8F6400", "#20799F", "#6B6B6B")
DARK_COLORS = ("#4BA3E3", "#F0803C", "#2FBF92", "#DD93BB", "#E69F00", "#8FD0F5", "#A3A3A3")
"""The colors of a page in dark mode, in the order of `COLORS`."""
DASHES = ((1, 0), (7, 3), (2, 2), (9, 3, 2, 3), (4, 2))
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
MARKERS = 24
"""Points of each line that get a marker and a tooltip, about."""

_SIZE = {"width": 560, "height": 300}
_FILE_STYLE: Mapping[str, Any] = {
    "background": "white",
    "padding": 12,
    "font": "sans-serif",
    "view": {"stroke": None},
    "axis": {"gridColor": "#e4e4e4", "domainColor": "#888", "tickColor": "#888", "titleFontWeight": "normal"},
    "title": {"anchor": "start", "fontWeight": 600, "offset": 12},
}
_LEGEND_WIDTH = 290
"""Pixels of a chart on a phone."""
_SHOWN = {"name": "shown", "bind": "legend", "select": {"type": "point", "fields": ["series"]}}
"""A click on a series in the legend shows it alone, and Shift adds another one."""
_ZOOM = {
    "name": "view",
    "bind": "scales",
    "select": {
        "type": "interval",
        # The wheel alone and a finger scroll the page: zooming takes Ctrl, moving takes a mouse.
        "zoom": "wheel![event.ctrlKey || event.metaKey]",
        "translate": "[pointerdown[event.pointerType != 'touch'], window:pointerup] > window:pointermove!",
    },
}


class Figure(NamedTuple):
    """A chart. Its `name` is unique in a report and names its files."""

    name: str
    title: str
    caption: str
    spec: Mapping[str, Any]
    table: Table
    subject: str = ""
    """The series or the layer that it belongs to, where the page says that once for several charts."""

    @property
    def full_title(self) -> str:
        return f"{self.subject}: {self.title}" if self.subject else self.title


class Axis(NamedTuple):
    """A column of a table as an axis, a color scale and a line of a tooltip."""

    field: str
    title: str
    format: str = "~s"
    """The d3 format of tick labels: `~s` for 12k, `~%`, `.3~f`. Ordinal axes ignore it."""
    precise: str = ".4~s"
    """The d3 format of a single value in a tooltip."""
    domain: tuple[float, float] | None = None
    """The range shown before the reader zooms; None for the range of the data."""
    kind: Literal["quantitative", "ordinal"] = "quantitative"
    doubles: bool = False
    """Whether equal distances are equal ratios: a scale of powers of 2."""

    def channel(self, label_separation: int = 8, **options: Any) -> dict[str, Any]:
        """Return the position channel of an encoding. Labels closer than `label_separation` pixels are left out."""
        axis: dict[str, Any] = {"labelOverlap": "greedy", "labelSeparation": label_separation, "labelAngle": 0}
        if self.kind == "quantitative":
            axis |= {"labelExpr": f"format(datum.value, '{self.format}')", "tickCount": 6}
        return {"field": self.field, "type": self.kind, "title": self.title, "axis": axis, **options}

    def scale(self, **options: Any) -> dict[str, Any]:
        """Return a scale with these options, over the axis's domain where it has one."""
        if self.doubles:  # which has no zero
            options = {**options, "type": "log", "base": 2}
            options.pop("zero", None)
        return options if self.domain is None else {**options, "domain": [*self.domain]}

    def tooltip(self, field: str | None = None) -> dict[str, Any]:
        """Return the tooltip line of this axis's column, or of another column in the same unit."""
        line = {"field": field or self.field, "title": field or self.title, "type": self.kind}
        return {**line, "format": self.precise} if self.kind == "quantitative" else line


def style_of(index: int) -> tuple[str, tuple[int, ...], str]:
    """Return the color, dash and marker shape of a series. The first 35 pairs of color and dash are distinct."""
    return COLORS[index % len(COLORS)], DASHES[index % len(DASHES)], SHAPES[index % len(SHAPES)]


def lines(
    name: str,
    title: str,
    caption: str,
    table: Table,
    x: Axis,
    y: Axis,
    series: Sequence[str],
    spread: Literal["band", "bars"] = "band",
) -> Figure:
    """Return a chart with one line per series, and a band, or a bar at each point, from column `least` to `most`.

    Column `series` of the table holds labels; points are joined in the order of its rows. `series` lists all labels in
    the order of their styles, which is the same in all figures of a report.
    """
    # A symbol and its gaps take 30 pixels, a letter of a label at most 8.
    columns = max(1, _LEGEND_WIDTH // (30 + 8 * max(map(len, series))))
    legend = {"orient": "bottom", "columns": columns, "symbolOpacity": 1, "labelLimit": _LEGEND_WIDTH - 30}
    scales = (
        {"domain": [*series], "range": [*styles]} for styles in zip(*map(style_of, range(len(series))), strict=True)
    )
    color, dash, shape = (
        {"field": "series", "type": "nominal", "title": None, "scale": scale, "legend": legend} for scale in scales
    )
    position = {
        channel: axis.channel(scale=axis.scale(zero=False, nice=axis.domain is None))
        for channel, axis in (("x", x), ("y", y))
    }

    def layer(mark: dict[str, Any], opacity: float, encoding: dict[str, Any], **options: Any) -> dict[str, Any]:
        visible = {"condition": {"param": "shown", "value": opacity}, "value": 0}
        channels = {**position, "color": color, "opacity": visible, **encoding}
        return {"mark": {"clip": True, **mark}, "encoding": channels, **options}

    least_to_most = {"y": {**position["y"], "field": "least"}, "y2": {"field": "most"}}
    every = max(1, math.ceil(len(table.rows) / (MARKERS * len(series))))
    nth_points = [
        {"window": [{"op": "row_number", "as": "row"}], "groupby": ["series"]},
        {"filter": f"datum.row % {every} == {1 % every}"},  # rows count from 1: the first point has a marker
    ]
    names = {"field": "series", "type": "nominal"}
    tooltip = [names, x.tooltip(), y.tooltip(), y.tooltip("least"), y.tooltip("most")]
    layers = [
        layer({"type": "area" if spread == "band" else "rule"}, 0.16 if spread == "band" else 0.7, least_to_most),
        layer(
            {"type": "line", "strokeWidth": 1.8, "strokeJoin": "round"}, 1, {"strokeDash": dash}, params=[_SHOWN, _ZOOM]
        ),
        layer(
            {"type": "point", "filled": True, "size": 34}, 1, {"shape": shape, "tooltip": tooltip}, transform=nth_points
        ),
    ]
    return Figure(name, title, caption, {"layer": layers}, table)


def load_map(title: str, table: Table, scale: tuple[float, float], subject: str = "") -> Figure:
    """Return a heat map of the load of experts, with the name of its table and one cell per row; light is much.

    The columns of the table are the y axis, the x axis, which keep the order of the rows, and a share of tokens times
    the number of experts, whose colors span `scale`.
    """
    y, x = (Axis(column, column, kind="ordinal") for column in table.columns[:2])
    color = Axis(table.columns[2], "tokens, times the even share", ".1f", precise=".2f", domain=scale)
    legend = {"orient": "top", "direction": "horizontal", "format": color.format, "gradientLength": 160, "offset": 30}
    legend |= {"gradientThickness": 8, "tickCount": 3, "titleFontWeight": "normal"}
    encoding = {
        "x": x.channel(sort=None),
        "y": y.channel(sort=None, label_separation=2),
        "color": {
            "field": color.field,
            "type": "quantitative",
            "title": color.title,
            "scale": color.scale(scheme="viridis", clamp=True),
            "legend": legend,
        },
        "tooltip": [x.tooltip(), y.tooltip(), color.tooltip()],
    }
    map_rows = len(set(table.column(y.field)))
    height = map_rows * max(3, min(28, 360 // max(map_rows, 1)))  # 3 to 28 pixels a row, 360 in all where that fits
    spec = {"mark": {"type": "rect"}, "encoding": encoding, "height": height}
    return Figure(table.name, title, "", spec, table, subject)


def in_page(figure: Figure) -> dict[str, Any]:
    """Return the specification for a page, as wide as its container. The page adds data, colors and a legend."""
    fit = {"autosize": {"type": "fit-x", "contains": "padding"}, "width": "container"}
    return {"height": _SIZE["height"], **figure.spec, **fit}


def require_renderer() -> None:
    """Raise a RecipeError unless vl-convert, which renders figures as SVG and PNG, is installed."""
    try:
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            f"--figures: SVG and PNG files need a package that is not installed ({error}): "
            "pip install 'switchcli[report]', or use --html, which needs no package"
        ) from error


def svg(figure: Figure) -> str:
    """Return the chart as an SVG image on white, with its title. Needs the extra `report`."""
    import vl_convert

    return vl_convert.vegalite_to_svg(_for_file(figure), allowed_base_urls=[])


def png(figure: Figure) -> bytes:
    """Return the chart as a PNG image with two pixels per unit. Needs the extra `report`."""
    import vl_convert

    return vl_convert.vegalite_to_png(_for_file(figure), scale=2, allowed_base_urls=[])


def _for_file(figure: Figure) -> dict[str, Any]:
    rows = [dict(zip(figure.table.columns, row, strict=True)) for row in figure.table.rows]
    return {**_SIZE, **figure.spec, "title": figure.full_title, "data": {"values": rows}, "config": _FILE_STYLE}


def write_files(figures: Iterable[Figure], tables: Iterable[Table], folder: Path) -> None:
    """Publish each figure as NAME.svg and NAME.png, and its values and every further table as NAME.csv.

    Figures of one table share its file: held_out.csv serves held_out_steps, _tokens, _wall_time and _flops. No file is
    replaced before all are rendered. Raises CheckpointError where the disk refuses.
    """
    contents: dict[str, str | bytes] = {}
    with disk_errors(folder, "give another folder by --figures"):  # before figures are rendered, which takes seconds
        folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        contents[f"{figure.name}.svg"] = svg(figure)
        contents[f"{figure.name}.png"] = png(figure)
        contents[f"{figure.table.name}.csv"] = figure.table.csv()
    contents |= {f"{table.name}.csv": table.csv() for table in tables}
    with disk_errors(folder, "give another folder by --figures"):
        publish.write_files(folder, contents)
