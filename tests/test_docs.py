"""The documentation: its site is built and whole, its guides are followed to the letter, its messages are ours."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_architecture import ROOT, sources

DOCS = ROOT / "docs"


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of each fenced block of a page that names its language, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def follow(page: str, folder: Path) -> None:
    """Runs the blocks of a guide as they stand there; each line of a `text` block must be said by the one before it.

    In such a line `...` stands for anything. One that begins with `mcf:` is an error, which the commands end with.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    found = blocks(page)
    for (language, text), (then, expected) in zip(found, [*found[1:], ("", "")], strict=True):
        if language == "text":
            continue
        assert language in ("bash", "python"), f"{page}: {language}"
        command = ["bash", "-eo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        said = f"{done.stdout}\n{done.stderr}"
        lines = expected.splitlines() if then == "text" else []
        fails = any(line.startswith("mcf:") for line in lines)
        assert (done.returncode != 0) == fails, f"{page}: code {done.returncode}\n{text}\n{said}"
        for line in lines:
            pattern = r"\s+".join(".*".join(map(re.escape, word.split("..."))) for word in line.split())
            assert re.search(rf"^\s*{pattern}\s*$", said, re.MULTILINE), f"{page}: {line!r} is not in\n{said}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it: a link or an anchor that leads nowhere, or a page that no menu has, fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_in_the_menu(site: Path) -> None:
    menu = (site / "index.html").read_text()
    assert [page.stem for page in DOCS.glob("*.md") if f'href="{page.stem}.html"' not in menu] == []


def test_the_site_loads_nothing_from_other_hosts(site: Path) -> None:
    loads = r"""<(?:script|img|iframe|source)[^>]*\bsrc="?(?:https?:)?//|<link[^>]*\bhref="?(?:https?:)?//"""
    pages = {page: page.read_text() for page in site.rglob("*.html")}
    assert len(pages) > 20
    found = [(page.name, match[0]) for page, text in pages.items() for match in re.finditer(loads, text)]
    found = [(name, text) for name, text in found if 'rel="canonical"' not in text]
    styles = r"""(?:url\(|@import)\s*["']?(?:https?:)?//"""
    assert found + [(file.name, "") for file in site.rglob("*.css") if re.search(styles, file.read_text())] == []
    assert not any('class="mermaid"' in text for text in pages.values()), "diagrams would load mermaid from a CDN"


def test_lists_and_tables_are_shown_as_such(site: Path) -> None:
    """A code host is more lenient: here a list or a table needs an empty line before it."""
    for page in site.glob("*.html"):
        for text in re.findall(r"<(?:p|li)>(.*?)</(?:p|li)>", page.read_text(), re.DOTALL):
            assert not re.search(r"^(?:- |\d+\. |\||```)", text, re.MULTILINE), f"{page.name}: {text[:300]}"


@pytest.mark.timeout(1800)  # a minute on two idle cores
@pytest.mark.parametrize("page", ["guide-shards.md", "guide-finetune.md"])
def test_a_guide_is_followed_to_the_letter(page: str, tmp_path: Path) -> None:
    follow(page, tmp_path)


def texts(path: Path) -> list[str]:
    """The string literals of a source file; `{}` stands for what is put into them."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_every_message_of_the_troubleshooting_is_one_of_ours() -> None:
    page = (DOCS / "troubleshooting.md").read_text().partition("## Errors of others")[0]
    quoted = [said for row in re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE) for said in re.findall(r"`(.*?)`", row)]
    ours = [text for path in sources() for text in texts(path)]
    patterns = {said: re.compile(".*".join(map(re.escape, said.split("..."))), re.DOTALL) for said in quoted}
    assert len(quoted) > 80
    assert [said for said, pattern in patterns.items() if not any(map(pattern.search, ours))] == []
