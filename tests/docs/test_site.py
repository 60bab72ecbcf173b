"""The site of docs/: it builds without a broken link, and a broken one is found."""

import functools
import http.server
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP_PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
SMALL = """\
[project]
site_name = "small"
docs_dir = "docs"
site_dir = "build/site"
use_directory_urls = false
nav = [{ "First" = "index.md" }, { "Second" = "second.md" }]

[project.theme]
font = false
"""
INDEX = "# First\n\n[second](second.md) and [its end](second.md#the-end)\n\n![picture](picture.svg)\n"
SECOND = "# Second\n\n## The end\n\n[back](index.md)\n"


def built_site(folder: Path) -> Path:
    import site_builder

    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "zensical.toml", folder)
    return site_builder.build(folder)


@contextmanager
def served(site: Path) -> Iterator[str]:
    """Serve a folder, and yield its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.integration
@pytest.mark.timeout(900)
def test_the_site_builds_strictly_and_fits_a_phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No page scrolls sideways at 390 pixels, and none asks another server for anything."""
    site = built_site(tmp_path)
    assert (site / "search.json").is_file()
    monkeypatch.syspath_prepend(str(ROOT / "tests/report"))
    import browser

    if browser.CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with served(site) as address, browser.chromium() as chromium:
        page = chromium.new_page(viewport={"width": 390, "height": 844})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        for file in sorted(site.rglob("*.html")):
            page.goto(f"{address}/{file.relative_to(site).as_posix()}")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, file.name
        assert [url for url in asked if not url.startswith((address, "data:"))] == []


@pytest.mark.parametrize("name", TOP_PAGES)
def test_links_of_a_page_at_the_top_lead_to_files(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL))
    local = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert [target for target in local if not (ROOT / target).exists()] == []


def small_site(folder: Path) -> Path:
    (folder / "docs").mkdir()
    (folder / "zensical.toml").write_text(SMALL)
    (folder / "docs/index.md").write_text(INDEX)
    (folder / "docs/second.md").write_text(SECOND)
    (folder / "docs/picture.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    return folder / "docs"


def faults_of(folder: Path) -> str:
    import site_builder

    with pytest.raises(site_builder.BrokenSite) as raised:
        site_builder.build(folder)
    return str(raised.value)


FAULTS = {
    "[gone](gone.md)": "page does not exist",
    "[gone](index.md#gone)": "anchor does not exist",
    "![gone](gone.svg)": "gone.svg: no such file",
    '<a href="gone.html">gone</a>': "gone.html: no such file",
    '<a href="index.html#gone">gone</a>': "#gone: no such anchor",
    "![far](https://example.org/far.svg)": "from another server",
}
"""What a page may have, and what is said of it."""


@pytest.mark.integration
def test_a_whole_site_has_no_faults_and_each_fault_of_a_page_is_found(tmp_path: Path) -> None:
    import site_builder

    docs = small_site(tmp_path)
    assert site_builder.build(tmp_path) == tmp_path / "build/site"
    links, others = [*FAULTS][:2], [*FAULTS][2:]  # the first stop the build before the others are looked for
    for texts in (links, others):
        (docs / "second.md").write_text("\n\n".join([SECOND, *texts]))
        said = faults_of(tmp_path)
        assert [text for text in texts if FAULTS[text] not in said] == []


@pytest.mark.integration
def test_a_page_outside_the_navigation_and_one_that_it_alone_has_are_found(tmp_path: Path) -> None:
    docs = small_site(tmp_path)
    (docs / "third.md").write_text("# Third\n")
    assert "third.md" in faults_of(tmp_path)
    (docs / "third.md").unlink()
    (docs / "second.md").unlink()
    (docs / "index.md").write_text("# First\n")
    assert "second.md" in faults_of(tmp_path)
