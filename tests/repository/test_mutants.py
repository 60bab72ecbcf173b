"""The list of mutants fits the code: each can be applied, and the tests that are to find it exist."""

import ast
import re
from collections import Counter

from mutate import ROOT, mutants

ARITHMETIC = (
    *(
        "model",
        "training",
        "data",
        "tasks",
        "planner",
        "distributed",
        "checkpoint",
        "convert",
        "doctor",
        "report",
        "terminal",
    ),
    "recipe",
)
"""The packages that compute."""


def test_each_mutant_changes_one_place_of_a_file_that_can_still_be_parsed() -> None:
    for mutant in mutants():
        text = (ROOT / mutant.file).read_text(encoding="utf-8")
        changed = mutant.apply(text)
        assert changed != text, mutant
        ast.parse(changed, mutant.file)


def test_the_tests_of_each_mutant_exist() -> None:
    missing = []
    for test in dict.fromkeys(test for mutant in mutants() for test in mutant.tests):
        file, _, function = test.partition("[")[0].partition("::")
        path = ROOT / file
        if not path.exists() or (function and not re.search(rf"^def {function}\(", path.read_text(), re.MULTILINE)):
            missing.append(test)
    assert not missing


def test_no_mutant_is_listed_twice_and_each_package_that_computes_has_ten() -> None:
    found = mutants()
    assert len({one[:3] for one in found}) == len(found)
    assert all(one.tests for one in found)
    counts = Counter(one.file.split("/")[1] for one in found)
    assert not {package: counts[package] for package in ARITHMETIC if counts[package] < 10}
