"""Where recipes are found, and what is said of those that are not."""

import pytest
from messages import assert_line

from switchcli.errors import RecipeError
from switchcli.recipe import library


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_shipped_recipes_have_names():
    assert {"quickstart/switch", "quickstart/dense", "pretrain/t5-base"} <= set(library.recipe_names())
    assert library.locate("quickstart/switch") == library.recipes_folder() / "quickstart/switch.yaml"


def test_an_installed_package_has_them_within(tmp_path, monkeypatch):
    package = tmp_path / "site-packages/switchcli"
    (package / "recipes/quickstart").mkdir(parents=True)
    (package / "recipes/quickstart/switch.yaml").touch()
    monkeypatch.setattr(library, "__file__", str(package / "recipe/library.py"))
    assert library.recipe_names() == ["quickstart/switch"]


def test_a_file_that_exists_is_taken_before_a_name(tmp_path):
    (tmp_path / "quickstart").mkdir()
    assert library.locate("quickstart/switch").is_relative_to(library.recipes_folder())
    (tmp_path / "quickstart/switch").touch()
    assert library.locate("quickstart/switch").resolve() == tmp_path / "quickstart/switch"


@pytest.mark.parametrize(
    ("name", "shown", "words"),
    [
        ("mine.yaml", "mine.yaml", "switchcli recipes list"),
        ("quickstart/switch.yaml", "quickstart/switch.yaml", "quickstart/switch"),
        ("recipes/quickstart/dense.yml", "recipes/quickstart/dense.yml", "quickstart/dense"),
        ("quickstart/swich", "quickstart/swich", "quickstart/switch"),
        ("dense", "dense", "quickstart/dense"),
        ("../../etc/passwd-", "../../etc/passwd-", "switchcli recipes list"),
        ("folder", "folder", "folder .yaml"),
        ("", "''", "folder .yaml"),
        ("a\0b.yaml", "'a\\x00b.yaml'", "switchcli recipes list"),
        ("x" * 5000, "x" * 5000, "File name too long"),
    ],
)
def test_what_is_not_there_is_said_with_the_nearest_name(tmp_path, name, shown, words):
    (tmp_path / "folder").mkdir()
    with pytest.raises(RecipeError) as raised:
        library.locate(name)
    assert_line(str(raised.value), shown, words)
    assert raised.value.exit_code == 2
