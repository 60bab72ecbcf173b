"""YAML as version 1.2 reads it, refusals with their line, and text that reads back equal."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import assert_line

from switchcli.errors import RecipeError
from switchcli.recipe import yaml_nodes


def read(source):
    return yaml_nodes.read(source, lambda line: f"f:{line}")


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("012", 12),
        ("0o17", 15),
        ("0x1F", 31),
        ("no", "no"),
        ("on", "on"),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("True", True),
        ("tRue", "tRue"),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ('"null"', "null"),
        ("=", "="),
        ("<<", "<<"),
        ("9" * 400, int("9" * 400)),
        ("9" * 401, float("inf")),
        ("0x" + "f" * 401, "0x" + "f" * 401),
        ("[1, [a], {b: c}]", [1, ["a"], {"b": "c"}]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(source, value):
    read_back = yaml_nodes.plain(read(source))
    assert read_back == value
    assert type(read_back) is type(value)


def many(aliases):
    """Return YAML whose aliases stand for a hundred values each."""
    return f"a: &a [{', '.join(['x'] * 99)}]\nb: [{', '.join(['*a'] * aliases)}]"


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("a: &x 2\nb: *x", {"a": 2, "b": 2}),
        ("a: &x {b: &y [1], c: *y}\nd: *x\ne: [*x, *y]", "{'a': X, 'd': X, 'e': [X, [1]]}"),
        ("&k a: 1\nb: *k", {"a": 1, "b": "a"}),
    ],
)
def test_an_alias_stands_for_its_anchors_value(source, value):
    expected = eval(value, {"X": {"b": [1], "c": [1]}}) if isinstance(value, str) else value
    assert yaml_nodes.plain(read(source)) == expected


@pytest.mark.parametrize(
    ("source", "where", "words"),
    [
        ("a: 1\nb: 2\na: 3", "f:3", "a f:1"),
        ("a: *x", "f:1", "alias 'x' &NAME quotes"),
        ("a: &x [*x]", "f:1", "32"),
        ("&x [&y [*x, *y]]", "f:1", "32"),
        (f"a: &x {'[' * 20}{']' * 20}\nb: {'[' * 13}*x{']' * 13}", "f:1", "32"),
        (many(99), "f:1", "10000"),
        ("a: !!str 3", "f:1", "tags tag:yaml.org,2002:str"),
        ("a: !python/object:os.system {}", "f:1", "tags !python/object:os.system"),
        ("a: 1\n2: 3", "f:2", "key quotes"),
        ("? [a]\n: 1", "f:1", "key quotes"),
        ("a: 1\n---\nb: 1", "f:2", "'---'"),
        ("[" * 33, "f:1", "32"),
        ("a: 1\nb: [1", "f:2", "YAML ']'"),
        ("a: b: c", "f:1", "YAML mapping quotes column"),
        ("a: 1\n\tb: 2", "f:2", r"YAML '\t' spaces"),
        ("a:\n  b: 1\n\t c: 2", "f:3", r"YAML '\t' spaces"),
        ("a: 1\n  b: 2", "f:2", "YAML mapping column"),
        ("a:\n  b: 1\n c: 2", "f:3", "YAML column"),
        ("a: 1\nb\nc: 2", "f:3", "YAML colon"),
        ("a: \x01", "f:1", r"'\x01'"),
        ("a: 1\nb: \ud800", "f:2", r"'\ud800'"),
        ('a: "\\ud800"', "f:1", "surrogate"),
        ('a: "\\U00110000"', "f:1", "YAML escape"),
        ("- " * 3000, "f:1", "32"),
        ("a:\n" + "- 1\n" * 10_000, "f:9999", "10000"),
    ],
)
def test_what_a_recipe_needs_not_is_refused_by_line(source, where, words):
    with pytest.raises(RecipeError) as raised:
        read(source)
    assert "\n" not in str(raised.value)
    assert_line(str(raised.value), where, words)


def test_as_many_values_as_there_may_be_are_read():
    assert len(read("- 1\n" * 9_999).value) == 9_999


def test_aliases_for_as_many_values_as_there_may_be_are_read():
    assert len(read(many(98)).value["b"].value) == 98


def test_nesting_of_32_is_read():
    assert read("[" * 32 + "]" * 32)


@pytest.mark.parametrize(
    ("content", "where", "words"),
    [
        (b"a: 1\nb: \xff", "mine.yaml:2", "8 UTF-8 iconv latin1"),
        ("a: 1".encode("utf-16"), "mine.yaml:1", "0 UTF-8 iconv utf-16"),
        ("a: 1".encode("utf-16-le"), "mine.yaml:1", r"'\x00'"),
        (b"#" * (2**20 + 1), "mine.yaml", "1048576 bytes"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, monkeypatch, content, where, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as raised:
        yaml_nodes.read_file(path)
    assert_line(str(raised.value), where, words)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path, reason in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "folder")):
        with pytest.raises(RecipeError) as raised:
            yaml_nodes.read_file(path)
        assert_line(str(raised.value), str(path), reason)


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path):
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: two\r\n")
    assert yaml_nodes.plain(yaml_nodes.read_file(path)) == {"a": 1, "b": "two"}


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(
        [
            "\x85",
            "a\u2028b",
            "\n",
            "\0",
            "1e-4",
            "no",
            "null",
            "=",
            "- a",
            "a: b",
            "#",
            "%",
        ]
    )
)
keys = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=10)


@given(values)
@settings(deadline=None)
def test_what_is_written_reads_back_equal(value):
    assert yaml_nodes.plain(read(yaml_nodes.write(value))) == value


@given(st.text(max_size=40))
@settings(deadline=None)
def test_any_text_is_read_or_refused(source):
    try:
        found = yaml_nodes.plain(read(source))
    except RecipeError as error:
        refused = str(error)
    else:
        assert repr(yaml_nodes.plain(read(yaml_nodes.write(found)))) == repr(found)
        return
    assert re.match(r"f:\d+: ", refused)  # the line, of whatever is wrong


@pytest.mark.parametrize(
    ("key", "shown"), [("a b", "a b"), ("a\nb", r"'a\nb'"), ("\x1b[31m", r"'\x1b[31m'"), ("", "''")]
)
def test_a_key_is_shown_on_one_line_and_without_control_characters(key: str, shown: str) -> None:
    assert yaml_nodes.display_key(key) == shown
