"""Help of every verb, and the version."""

import pytest
from conftest import SwitchCLI

from switchcli import __version__


@pytest.mark.parametrize("verb", ["pretrain", "generate", "doctor", "recipes"])
def test_every_verb_has_help_and_is_listed(verb: str, switchcli: SwitchCLI) -> None:
    for option in ("--help", "-h"):
        done = switchcli(verb, option)
        assert (done.code, done.err) == (0, "")
        assert "Usage" in done.out
    assert verb in switchcli("--help").out


def test_version(switchcli: SwitchCLI) -> None:
    assert switchcli("--version") == (0, f"switchcli {__version__}\n", "")


def test_no_verb_shows_the_help(switchcli: SwitchCLI) -> None:
    done = switchcli()
    assert done.code == 2
    assert "Usage" in done.out
