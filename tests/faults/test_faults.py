"""Whatever a disk does at whatever operation of whatever verb: what was there stays, and the same command goes on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.harness import FAULTS, VERBS, Prepared, lay_out


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("faults").resolve())


@pytest.fixture(scope="session")
def prepared(sound: Path) -> dict[str, Prepared]:
    """The verbs that have been prepared."""
    return {}


@pytest.fixture
def verb(request: pytest.FixtureRequest, sound: Path, prepared: dict[str, Prepared]) -> Iterator[Prepared]:
    name = request.param
    prepared[name] = prepared.get(name) or Prepared.of(sound, name)
    return prepared[name]


def assert_nothing_is_lost(verb: Prepared, fault: str, few: bool, record: pytest.FixtureRequest) -> None:
    operations = verb.operations(fault, few)
    wrong = [found for at in operations if (found := verb.trial(fault, at))]
    record.node.user_properties.append(("trials", len(operations)))
    assert not wrong, f"{len(wrong)} of {len(operations)}:\n" + "\n".join(wrong)


@pytest.mark.integration
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "kill"])  # a power cut is a kill, and worse
@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if not verb.is_slow], indirect=True)
def test_a_disk_that_fails_loses_nothing(verb: Prepared, fault: str, request: pytest.FixtureRequest) -> None:
    assert_nothing_is_lost(verb, fault, few=True, record=request)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("verb", VERBS, indirect=True)
def test_a_disk_that_fails_at_any_operation_loses_nothing(
    verb: Prepared, fault: str, request: pytest.FixtureRequest
) -> None:
    assert_nothing_is_lost(verb, fault, few=False, record=request)
