"""The tables of a routing atlas: they fit a terminal, and no piece of a vocabulary does anything to it."""

import io
from typing import Any

from messages import lacking
from routing_survey import a_survey

from switchcli.report.console import PLAIN_WIDTH, Console
from switchcli.report.routing_tables import TERMINAL_EXPERTS, shown, tables


def printed(survey: dict[str, Any]) -> str:
    stream = io.StringIO()
    for table in tables(survey):
        Console(stream=stream).rows(*table)
    return stream.getvalue()


def test_all_is_there_and_fits_a_terminal() -> None:
    said = printed(a_survey(experts=2 * TERMINAL_EXPERTS, pieces=["antidisestablishment"] * 10))
    assert max(map(len, said.splitlines())) <= PLAIN_WIDTH
    rows = [line.split() for line in said.splitlines()]
    assert ["Encoder", "block", "12", "4.96k", "25.0%", "1", "0.50", "1.00", "0.50", "-", "-0.25"] in rows
    assert ["31", *["antidisestablishment"] * 2, "6.2%", "12.5%", "0.50", "256-511:", "1.0x", "6.2%"] in rows
    assert not lacking(said, f"Encoder block 12: {TERMINAL_EXPERTS} {2 * TERMINAL_EXPERTS} experts --json")
    assert [row[0] for row in rows if "antidisestablishment" in row] == [*map(str, range(16, 32))] * 4
    attention = ["Decoder", "block", "12,", "self", "attention"]
    assert [*attention, "4.96k", "25.0%", "1", "0.50", "1.00", "0.50", "-", "-0.25"] in rows
    assert [*attention, "60", "50.0%", "0.25"] in rows
    assert ["en", "31", "(6%)", "30", "(6%)", "29", "(6%)", "28", "(6%)", "27", "(5%)", "26", "(5%)"] in rows
    assert not lacking(said, "runs/two/checkpoints/step-00000010 capacity paper sequences 8 en de")


def test_an_expert_without_a_token_is_shown_as_such() -> None:
    (line,) = {line.strip() for line in printed(a_survey()).splitlines() if "no token" in line}
    assert line.split() == ["0", "no", "token", "0.0%", "-", "-", "-", "-"]


def test_pieces_are_harmless_and_on_one_line() -> None:
    hostile = ["\x1b[2Jgo", "\n\n", "\t", "[bold]", "\u202eright", "<pad>"]
    said = printed(a_survey(pieces=hostile))
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert r"\x1b[2Jgo \n\n \t [bold] \u202eright (start)" in said
    assert shown("\n" + 15 * "\u2581" + "x") == "\\n\u2581\u00d715x"
