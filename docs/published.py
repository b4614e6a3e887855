"""The repository's own files on the site: mkdocs' hook that adds them as pages, and makes links between them hold.

A Markdown file keeps links that hold where it stands, so that it reads well in the repository too; on the site each
link to a published file leads to its page.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# A file of the repository -> its page.
PAGES = {
    "CONTRIBUTING.md": "contributors/contributing.md",
    "CHANGELOG.md": "contributors/changelog.md",
    "ses_fast/embedded/README.md": "how/embedded.md",
}
LINK = re.compile(r"(\]\()((?!https?:|mailto:|#)[^)#\s]+)")


def published() -> dict[str, str]:
    """Every file from outside docs/ -> where it is on the site; of results the JSON too, to be downloaded."""
    results = sorted((ROOT / "bench" / "results").iterdir())
    return PAGES | {f"bench/results/{path.name}": f"results/files/{path.name}" for path in results}


def rewritten(
    markdown: str,
    source: str,  # where the page is in the repository
    uri: str,  # and on the site
) -> str:
    """The page with its links to the repository's files as links of the site."""
    pages, folder = published(), posixpath.dirname(uri)

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        there = pages.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        return match[0] if there is None else match[1] + posixpath.relpath(there, folder or ".")

    return LINK.sub(link, markdown)


def on_files(files: Files, config: Any) -> Files:
    """mkdocs' event: the files of the site are known."""
    for source, uri in published().items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """mkdocs' event: a page is read."""
    sources = {uri: source for source, uri in published().items()}
    return rewritten(markdown, sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"), page.file.src_uri)
