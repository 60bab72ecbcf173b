"""The release: one version everywhere, a README of one page, complete wheel and source distribution."""

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path, PurePosixPath

import pytest
import yaml

from switchcli import __version__

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
README_LINES = 200


def test_all_files_name_one_version_and_one_date() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    entries = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", changelog, re.MULTILINE)
    assert entries[0] == ("Unreleased", "")
    assert entries[1] == (__version__, citation["date-released"])
    assert citation["version"] == __version__


def test_the_citation_has_what_its_format_requires() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    for work in (citation, *citation["references"]):
        assert work["type"]
        assert work["title"]
        assert all(author.keys() in ({"name"}, {"family-names", "given-names"}) for author in work["authors"])


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_a_picture_of_the_readme_says_what_it_shows() -> None:
    """A page that has no picture, such as that of the package index, shows these words in its place."""
    pictures = re.findall(r"!\[([^]]*)\]", README.read_text(encoding="utf-8"))
    assert pictures
    assert all(len(words.split()) > 5 for words in pictures)


def test_the_issue_forms_are_valid() -> None:
    forms = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 3
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(form)
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert len({field["id"] for field in fields}) == len(fields)
        assert {field["type"] for field in fields} <= {"input", "textarea", "dropdown", "checkboxes"}
        assert all(field["attributes"]["label"] for field in fields)


@pytest.mark.parametrize(("name", "command"), [("ci", ".ci/run"), ("nightly", "scripts/test --nightly")])
def test_a_workflow_runs_on_the_pythons_and_the_oldest_torch_that_the_package_names(name: str, command: str) -> None:
    workflow = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["test"]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    rows = job["strategy"]["matrix"]["include"]
    oldest = [row["torch"] for row in rows if "torch" in row]
    assert [row["python"] for row in rows if "torch" not in row] == re.findall(r'Python :: (3\.\d+)"', project)
    assert oldest == [f"{version}.0" for version in re.findall(r'"torch>=([\d.]+)', project)]
    assert job["steps"][-1]["run"] == command


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is built from it. Uses no network."""
    out = tmp_path_factory.mktemp("dist")
    build(out, ROOT)
    return out / f"switchcli-{__version__}.tar.gz", out / f"switchcli-{__version__}-py3-none-any.whl"


def build(out: Path, root: Path) -> None:
    """Build both files into `out`. Raises CalledProcessError, whose output is in the test's, if it fails."""
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(root))
    subprocess.run(command, check=True, timeout=240)


def wheel_metadata(wheel: Path) -> Message:
    """The METADATA file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(f"switchcli-{__version__}.dist-info/METADATA"))


@pytest.mark.integration
def test_both_files_pass_twine(built: tuple[Path, Path]) -> None:
    subprocess.run((sys.executable, "-m", "twine", "check", "--strict", *map(str, built)), check=True, timeout=120)


@pytest.mark.integration
def test_the_wheel_holds_the_package_its_recipes_the_pages_of_its_help_and_nothing_else(
    built: tuple[Path, Path],
) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
    folder = f"switchcli-{__version__}.dist-info"
    assert {PurePosixPath(name).parts[0] for name in names} == {"switchcli", folder}
    assert {f"{folder}/entry_points.txt", f"{folder}/licenses/LICENSE", "switchcli/py.typed"} <= names
    assert f"{folder}/licenses/switchcli/report/vega/LICENSES.txt" in names
    pages = tracked("docs/concepts", "docs/how-to", "docs/reference", "docs/index.md", "docs/tutorial.md")
    packaged = tracked("switchcli") | {f"switchcli/{name}" for name in tracked("recipes") | pages}
    assert {name for name in names if not name.startswith(folder)} == packaged


@pytest.mark.integration
def test_the_source_distribution_holds_what_the_repository_does(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert (
        tracked("README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "docs", "recipes", "scripts", "tests") <= names
    )
    assert names - tracked(".") == {"PKG-INFO"}


def tracked(*paths: str) -> set[str]:
    """The files below `paths` that belong to the repository: in git, or not yet added to it and not ignored."""
    command = ("git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *paths)
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


@pytest.mark.integration
def test_the_metadata_are_complete(built: tuple[Path, Path]) -> None:
    metadata = wheel_metadata(built[1])
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == README.read_text(encoding="utf-8")
