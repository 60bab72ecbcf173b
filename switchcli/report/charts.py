"""Charts as Vega-Lite specifications, with the numbers that they show: for a page, and as SVG, PNG and CSV files.

A specification is a plain dict without data: `Figure.table` has those, by columns, and several figures may share one.
Series are told apart by colour (of Okabe and Ito, without its yellow and black), dashes and shapes at once, heat maps
are read by lightness: neither needs colour vision.
"""

import csv
import functools
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from switchcli import publish
from switchcli.errors import disk_errors

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ((1, 0), (7, 3), (2, 2), (9, 3, 2, 3), (4, 2))
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
MARKS = 24
"""Points of a series that are drawn as its shape, and answer the mouse."""

_WIDTH, _HEIGHT = 560, 300
_ON_WHITE: Mapping[str, Any] = {
    "background": "white",
    "padding": 12,
    "font": "sans-serif",
    "view": {"stroke": None},
    "axis": {"gridColor": "#e4e4e4", "domainColor": "#888", "tickColor": "#888", "titleFontWeight": "normal"},
    "legend": {"orient": "bottom", "columns": 3, "symbolSize": 90, "symbolOpacity": 1, "labelLimit": 240},
    "title": {"anchor": "start", "fontWeight": 600, "offset": 12},
}

Value = str | float | None


class Table(NamedTuple):
    """Numbers by column, all of one length. `name` is that of its file."""

    name: str
    columns: Mapping[str, Sequence[Value]]

    def csv(self) -> str:
        """With a heading, as spreadsheets read it; what is not known is empty.

        A text that a spreadsheet would take for a formula, by its first letter, gets an apostrophe before it.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(map(_harmless, row) for row in zip(*self.columns.values(), strict=True))
        return text.getvalue()


def _harmless(value: Value) -> Value:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


class Figure(NamedTuple):
    """A chart. `name` is that of its files, and is unique in a page."""

    name: str
    title: str
    caption: str
    spec: Mapping[str, Any]
    table: Table


class Axis(NamedTuple):
    """A column of the table as a chart shows it."""

    field: str
    title: str
    format: str = "~s"
    """Of d3: `~s` for 12k, `~%`, `.3~f`; ignored where the values are names."""
    precise: str = ".4~s"
    """The same where one value is told."""
    domain: tuple[float, float] | None = None
    """What is seen before anyone zooms; absent: all."""
    kind: Literal["quantitative", "ordinal"] = "quantitative"

    def channel(self, separation: int = 8, **more: Any) -> dict[str, Any]:
        """Of an encoding; labels closer than `separation` pixels are left out."""
        axis: dict[str, Any] = {"labelOverlap": "greedy", "labelSeparation": separation, "labelAngle": 0}
        if self.kind == "quantitative":
            axis |= {"labelExpr": f"format(datum.value, '{self.format}')", "tickCount": 6}
        return {"field": self.field, "type": self.kind, "title": self.title, "axis": axis, **more}

    def tip(self, field: str | None = None, title: str | None = None) -> dict[str, Any]:
        """Of a tooltip."""
        known = {"format": self.precise} if self.kind == "quantitative" else {}
        return {"field": field or self.field, "title": title or self.title, "type": self.kind, **known}


def style_of(place: int) -> tuple[str, tuple[int, ...], str]:
    """Colour, dash and shape of the series at a place: no two of the first thirty-five are alike."""
    return COLOURS[place % len(COLOURS)], DASHES[place % len(DASHES)], SHAPES[place % len(SHAPES)]


def lines(name: str, title: str, caption: str, table: Table, x: Axis, y: Axis, series: Sequence[str]) -> Figure:
    """A line a series through the points of `table`, in its order, within a band from column `least` to `most`.

    The column `series` has their labels; `series` is the order of their styles, the same in all figures of a report.
    """
    told = _told(series)
    where = {"x": x.channel(scale=_scale(x)), "y": y.channel(scale=_scale(y))}
    rows = max(map(len, table.columns.values()), default=0)
    every = max(1, -(-rows // (MARKS * max(1, len(series)))))
    tips = [{"field": "series", "type": "nominal"}, x.tip(), y.tip(), y.tip("least", "least"), y.tip("most", "most")]
    low = {"y": {**where["y"], "field": "least"}, "y2": {"field": "most"}}
    layers = [
        {
            "mark": {"type": "area", "clip": True},
            "encoding": {**where, **low, "color": told["color"], "opacity": _unless_hidden(0.16)},
        },
        {
            "mark": {"type": "line", "clip": True, "strokeWidth": 1.8, "strokeJoin": "round"},
            "params": [_zoom()],
            "encoding": {
                **where,
                "color": told["color"],
                "strokeDash": told["strokeDash"],
                "opacity": _unless_hidden(1),
            },
        },
        {
            "mark": {"type": "point", "filled": True, "clip": True, "size": 34},
            "transform": [
                {"window": [{"op": "row_number", "as": "row"}], "groupby": ["series"]},
                {"filter": f"datum.row % {every} == {1 % every}"},
            ],
            "encoding": {
                **where,
                "color": told["color"],
                "shape": told["shape"],
                "opacity": _unless_hidden(1),
                "tooltip": tips,
            },
        },
    ]
    return Figure(name, title, caption, {"params": [{"name": "hidden", "value": []}], "layer": layers}, table)


def _told(series: Sequence[str]) -> dict[str, Any]:
    """The channels by which series are told apart."""
    colours, dashes, shapes = zip(*map(style_of, range(len(series))), strict=True)
    return {
        channel: {
            "field": "series",
            "type": "nominal",
            "title": None,
            "scale": {"domain": [*series], "range": [*range_]},
        }
        for channel, range_ in {"color": colours, "strokeDash": dashes, "shape": shapes}.items()
    }


def _unless_hidden(opacity: float) -> dict[str, Any]:
    """A page's legend sets `hidden`."""
    return {"condition": {"test": "indexof(hidden, datum.series) < 0", "value": opacity}, "value": 0}


def heat_map(name: str, title: str, caption: str, table: Table, x: Axis, y: Axis, colour: Axis) -> Figure:
    """A cell a row of `table`; `x` and `y` are ordinal, in the order of the rows. What is more is lighter."""
    rows = len(dict.fromkeys(table.columns[y.field]))
    scale = {"scheme": "viridis", "clamp": True, **({} if colour.domain is None else {"domain": list(colour.domain)})}
    legend = {"orient": "top", "direction": "horizontal", "format": colour.format, "gradientLength": 160, "offset": 24}
    legend |= {"gradientThickness": 8, "tickCount": 3, "titleFontWeight": "normal"}
    encoding = {
        "x": x.channel(sort=None),
        "y": y.channel(sort=None, separation=2),
        "color": {"field": colour.field, "type": "quantitative", "title": colour.title}
        | {"scale": scale, "legend": legend},
        "tooltip": [x.tip(), y.tip(), colour.tip()],
    }
    spec = {"mark": {"type": "rect"}, "encoding": encoding, "height": rows * max(3, min(16, 360 // max(rows, 1)))}
    return Figure(name, title, caption, spec, table)


def in_page(figure: Figure) -> dict[str, Any]:
    """Its specification for a page, that has data, colours of axes and legend; as wide as there is room."""
    fitted = {"autosize": {"type": "fit-x", "contains": "padding"}, "width": "container"}
    return {"height": _HEIGHT, **figure.spec, **fitted}


def svg(figure: Figure) -> str:
    """The chart as a file of its own, on white, with its title."""
    import vl_convert

    return vl_convert.vegalite_to_svg(_alone(figure), allowed_base_urls=[])


def png(figure: Figure) -> bytes:
    """The same as pixels, two a unit."""
    import vl_convert

    return vl_convert.vegalite_to_png(_alone(figure), scale=2, allowed_base_urls=[])


def write_files(figures: Iterable[Figure], tables: Iterable[Table], folder: Path) -> None:
    """Publish each figure as NAME.svg and NAME.png, its numbers and each further table as NAME.csv.

    Figures of one table share a file: held_out.csv for held_out_steps, _tokens, _wall_time and _flops, training.csv for
    training_steps and so on. No file is replaced before all are written. Raises CheckpointError where the disk refuses.
    """
    contents: dict[str, str | bytes] = {}
    with disk_errors(folder, "give another folder by --figures"):  # before figures are drawn, which takes seconds
        folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        contents[f"{figure.name}.svg"] = svg(figure)
        contents[f"{figure.name}.png"] = png(figure)
        contents[f"{figure.table.name}.csv"] = figure.table.csv()
    contents |= {f"{table.name}.csv": table.csv() for table in tables}
    with disk_errors(folder, "give another folder by --figures"):
        publish.write_files(folder, contents)


@functools.cache
def library() -> str:
    """The JavaScript that draws specifications: Vega, Vega-Lite and their embedding, as `vegaEmbed`."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _alone(figure: Figure) -> dict[str, Any]:
    columns = figure.table.columns
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    size = {"width": _WIDTH, "height": _HEIGHT}
    return {**size, **figure.spec, "title": figure.title, "data": {"values": rows}, "config": _ON_WHITE}


def _scale(axis: Axis) -> dict[str, Any]:
    return {"zero": False, "nice": axis.domain is None} | ({} if axis.domain is None else {"domain": list(axis.domain)})


def _zoom() -> dict[str, Any]:
    """Ctrl and wheel (or two fingers on a pad) zoom, a drag by mouse moves, two clicks undo it.

    The wheel alone, and a finger, are left to scrolling the page.
    """
    drag = "[pointerdown[event.pointerType != 'touch'], window:pointerup] > window:pointermove!"
    return {
        "name": "view",
        "bind": "scales",
        "select": {"type": "interval", "zoom": "wheel![event.ctrlKey || event.metaKey]", "translate": drag},
    }
