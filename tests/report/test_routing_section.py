"""Routing in a report: tables fit a terminal, maps show what was counted, and no token does anything to either."""

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, needs_chromium
from messages import lacking
from routing_survey import LAYERS, a_survey

from switchcli.report import charts
from switchcli.report.charts import Figure, write_files
from switchcli.report.html_page import write_page
from switchcli.report.routing_section import PAGE_EXPERTS, TERMINAL_EXPERTS, section, shown, tables
from switchcli.report.run_report import Report, parts, title
from switchcli.terminal.console import PLAIN_WIDTH, Console


def printed(survey: dict[str, Any]) -> str:
    stream = io.StringIO()
    for table in tables(survey):
        Console(stream=stream).show(table)
    return stream.getvalue()


def test_all_is_there_and_fits_a_terminal() -> None:
    said = printed(a_survey(experts=2 * TERMINAL_EXPERTS, pieces=["antidisestablishment"] * 10))
    assert max(map(len, said.splitlines())) <= PLAIN_WIDTH
    rows = [line.split() for line in said.splitlines()]
    assert ["Encoder", "block", "11", "4.96k", "25.0%", "1", "1.75", "0.62", "0.50", "1.00"] in rows
    assert ["31", *["antidisestablishment"] * 2, "6.2%", "12.5%", "0.50", "6.2%"] in rows
    assert not lacking(said, f"Encoder block 11: {TERMINAL_EXPERTS} {2 * TERMINAL_EXPERTS} experts --json")
    assert [row[0] for row in rows if "antidisestablishment" in row] == [*map(str, range(16, 32))] * 2
    attention = ["Decoder", "block", "11,", "self", "attention"]
    assert [*attention, "4.96k", "25.0%", "1", "1.75", "0.62", "0.50", "1.00"] in rows
    assert ["en", "31", "(6%)", "30", "(6%)", "29", "(6%)", "28", "(6%)", "27", "(5%)", "26", "(5%)"] in rows
    assert not lacking(said, "runs/one/checkpoints/step-00000010 capacity paper sequences 8 en de")


def test_an_expert_without_a_token_is_shown_as_such() -> None:
    (line,) = {line.strip() for line in printed(a_survey()).splitlines() if "no token" in line}
    assert line.split() == ["0", "no", "token", "0.0%", "-", "-", "-"]


def test_pieces_are_harmless_and_on_one_line() -> None:
    hostile = ["\x1b[2Jgo", "\n\n", "\t", "[bold]", "\u202eright", "<pad>"]
    said = printed(a_survey(pieces=hostile))
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert r"\x1b[2Jgo \n\n \t [bold] \u202eright (start)" in said
    assert shown("\n" + 15 * "\u2581" + "x") == "\\n\u2581\u00d715x"


def drawn(survey: dict[str, Any]) -> dict[str, Figure]:
    """Return the figures by name; each name is unique."""
    figures = section(survey).figures
    found = {figure.name: figure for figure in figures}
    assert len(found) == len(figures)
    return found


def test_the_maps_show_what_was_counted() -> None:
    figures = drawn(a_survey())
    assert len(figures) == 1 + 2 * 2
    suffix = LAYERS[0].replace(".", "_")
    text = figures[f"text_{suffix}"]
    assert text.full_title == "Encoder block 11: By text"
    cells = text.table.rows
    assert {(label, expert): round(float(times or 0), 6) for label, expert, times in cells} == {
        (label, expert): round(4 * 10 * (expert if label == "en" else 3 - expert) / 60, 6)
        for label in ("en", "de")
        for expert in range(4)
    }
    assert set(figures[f"sentinel_{suffix}"].table.column("sentinel")) == {"<extra_id_0>"}  # the other is rare
    experts = figures["experts"].table
    assert experts.rows[:2] == [("Encoder block 11", 0, 0.0), ("Decoder block 11, self attention", 0, 0.0)]


def test_of_many_experts_those_with_most_tokens_are_drawn() -> None:
    words = f"{PAGE_EXPERTS} {2 * PAGE_EXPERTS} experts --json"
    for figure in drawn(a_survey(experts=2 * PAGE_EXPERTS)).values():
        assert set(figure.table.column("expert")) == {*range(PAGE_EXPERTS, 2 * PAGE_EXPERTS)}, figure.name
        assert not lacking(figure.title, words)


def test_the_title_names_the_run_from_within_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = tmp_path / "mine" / "checkpoints" / "step-00000010"
    step.mkdir(parents=True)
    for within, checkpoint in (("mine", "."), ("mine", f"checkpoints/{step.name}"), ("mine/checkpoints", step.name)):
        monkeypatch.chdir(tmp_path / within)
        assert not lacking(title(Report(routing={**a_survey(), "checkpoint": checkpoint})), "mine step 10")


def test_the_page_has_every_figure_and_no_text_that_does_anything(tmp_path: Path) -> None:
    survey = a_survey(pieces=["</script><script>alert(1)</script>", "<b>&\u202e"])
    report = Report(routing=survey)
    write_page(tmp_path / "page.html", title(report), parts(report))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert set(re.findall('data-figure="([^"]+)"', page)) == drawn(survey).keys()
    assert re.search(r"<title>.*\bone, step 10\b.*</title>", page)
    assert "alert(1)</script>" not in page
    assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;\u00a02.0x" in page
    assert "&lt;b&gt;&amp;\\u202e\u00a01,234" in page


@pytest.mark.integration
def test_figures_are_files(tmp_path: Path) -> None:
    figures = section(a_survey(pieces=['a,"b', "\n"])).figures[:2]
    write_files(figures, [], tmp_path / "figures")
    files = {f"{figure.name}.{ending}" for figure in figures for ending in ("csv", "png", "svg")}
    written = {path.name for path in (tmp_path / "figures").iterdir()}
    assert written == files
    rows = [*csv.reader(io.StringIO((tmp_path / "figures/experts.csv").read_text()))]
    assert rows[1] == ["Encoder block 11", "0", "0.0"]
    assert figures[1].full_title in charts.svg(figures[1])


@pytest.mark.integration
@needs_chromium
def test_a_browser_draws_every_map_with_a_cell_for_each_count_and_has_nothing_to_say(tmp_path: Path) -> None:
    survey = a_survey(pieces=["</script><script>window.ran = true</script>"])
    report = Report(routing=survey)
    write_page(tmp_path / "page.html", title(report), parts(report))
    figures = drawn(survey)
    with chromium() as browser:
        tab = browser.new_page()
        said: list[str] = []
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("console", lambda message: said.append(message.text))
        tab.goto((tmp_path / "page.html").as_uri())
        for details in tab.locator("details").all():
            details.locator("summary").click()
        for name, figure in figures.items():
            plot = tab.locator(f'[data-figure="{name}"]')
            plot.locator("svg").wait_for()
            cells = len(figure.table.rows)
            assert plot.locator(".mark-rect.role-mark path").count() == cells, name
        assert tab.evaluate("window.ran") is None
        assert said == []
