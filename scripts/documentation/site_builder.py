"""Build the site of docs/ with zensical, and check what zensical does not: pictures, the navigation, other servers."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

CONFIG = "zensical.toml"
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src"}
"""The attribute of each tag that names a file which a browser loads at once."""
NOT_LOADED = {"canonical", "alternate", "next", "prev", "edit", "author", "license"}


class BrokenSite(Exception):
    """The site has a fault. The message has one line for each."""


def build(root: Path) -> Path:
    """Build the site of `root`, which has a zensical.toml, and return its folder.

    Raises:
        BrokenSite: a link or an anchor leads nowhere, a page is in no navigation or missing, a picture is missing, or a
            page loads a file from another server.
    """
    project = tomllib.loads((root / CONFIG).read_text(encoding="utf-8"))["project"]
    faults = [*_navigation_faults(root, project)]
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "--config-file", CONFIG]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"}
    )
    if done.returncode:
        faults.append((done.stdout + done.stderr.partition("Traceback")[0]).strip())
        raise BrokenSite("\n".join(faults))
    site = root / project["site_dir"]
    faults += _page_faults(site)
    if faults:
        raise BrokenSite("\n".join(faults))
    return site


def _navigation_faults(root: Path, project: dict[str, Any]) -> Iterator[str]:
    """Yield the pages that the navigation names and that do not exist, and those that it does not name."""
    docs = root / project["docs_dir"]
    listed = {*_pages(project["nav"])}
    written = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    yield from (f"{CONFIG}: nav: {page}: no such page in {project['docs_dir']}" for page in sorted(listed - written))
    yield from (f"{CONFIG}: nav: add {page}, which no reader finds now" for page in sorted(written - listed))


def _pages(entries: Any) -> Iterator[str]:
    for entry in entries.values() if isinstance(entries, dict) else entries:
        if isinstance(entry, str):
            yield entry
        else:
            yield from _pages(entry)


class _Page(HTMLParser):
    """The links of a page: what it loads, and where it leads."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.anchors.add(attributes.get("id", ""))
        if tag == "link" and not NOT_LOADED & {*attributes.get("rel", "").split()}:
            self.loaded.append(attributes.get("href", ""))
        elif tag in LOADS and LOADS[tag] in attributes:
            self.loaded.append(attributes[LOADS[tag]])
        elif tag == "a" and "href" in attributes:
            self.linked.append(attributes["href"])


def _page_faults(site: Path) -> Iterator[str]:
    """Yield the links of the built pages that lead nowhere, and the files that pages load from other servers."""
    pages: dict[Path, _Page] = {}
    for path in sorted(site.rglob("*.html")):
        pages[path] = _Page()
        pages[path].feed(path.read_text(encoding="utf-8"))
    for path, page in pages.items():
        name = path.relative_to(site)
        if name.name == "404.html":
            continue  # its links are absolute, since it is shown at any address
        for target in page.loaded:
            if urlsplit(target).netloc:
                yield f"{name}: loads {target} from another server"
        for target in (*page.loaded, *page.linked):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file():
                yield f"{name}: {target}: no such file"
            elif parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].anchors:
                yield f"{name}: {target}: no such anchor"
