"""What ``mkdocs build`` does beside its own: files outside ``docs/`` that a page links to.

Pages link as they would on a code host, ``../results/README.md``. Each such file, and what it links
to in turn, becomes a page or a file of the site, and links are turned to where they lie there;
the README is the first page. A link that leads nowhere is left as it is, so that mkdocs, with
``--strict``, fails on it. Links to other sites are not fetched: they are listed, one a line with
its page, in ``external-links.txt``.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = "docs/"
# [text](target#anchor), also of an image
LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)#\s]+)(?P<after>(?:#[^)\s]*)?\))")
CODE = re.compile(r"^(?P<fence>`{3,}).*?^(?P=fence)[ \t]*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LOADED = re.compile(r'<(?:script|img|link)\b[^>]*\b(?:src|href)="((?:https?:)?//[^"]+)"')
EXTERNAL = re.compile(r'href="(https?://[^"]+)"')

_log = logging.getLogger("mkdocs.hooks.site_files")
_external: dict[str, str] = {}


def site_uri(path: str) -> str:
    """Where a file of the repository lies in the site's sources."""
    return "index.md" if path == "README.md" else path.removeprefix(DOCS)


def repository_path(uri: str) -> str:
    """The reverse of :func:`site_uri`."""
    if uri == "index.md":
        return "README.md"
    return DOCS + uri if (ROOT / DOCS / uri).exists() else uri


def target_of(link: str, path: str) -> str | None:
    """The repository's file that a link in the file ``path`` leads to."""
    if "://" in link or link.startswith(("/", "mailto:")):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), unquote(link)))
    if (ROOT / target).is_dir():
        target = posixpath.join(target, "README.md")
    inside = not target.startswith("..") and (ROOT / target).is_file()
    return target if inside else None


def links(markdown: str) -> Iterator[re.Match[str]]:
    """Links of a page, those in code left out."""
    code = [found.span() for found in CODE.finditer(markdown)]
    for found in LINK.finditer(markdown):
        if not any(start <= found.start() < end for start, end in code):
            yield found


def on_files(files: Files, config: Any) -> Files:
    """Add the README, the changelog and all that lies outside ``docs/`` and is linked to."""
    waiting = [
        "README.md",
        "CHANGELOG.md",
        *(DOCS + f.src_uri for f in files.documentation_pages()),
    ]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if not path.startswith(DOCS):
            there = str(ROOT / path)
            files.append(File.generated(config, site_uri(path), abs_src_path=there))
        if path.endswith(".md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            targets = [target_of(found["target"], path) for found in links(text)]
            new = {t for t in targets if t is not None} - seen
            seen |= new
            waiting += sorted(new)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links to the repository's files into links to the site's."""
    path = repository_path(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)
    parts, end = [], 0
    for found in links(markdown):
        target = target_of(found["target"], path)
        if target is not None:
            link = posixpath.relpath(site_uri(target), here or ".")
            parts += [markdown[end : found.start()], found["before"], link, found["after"]]
            end = found.end()
    return "".join([*parts, markdown[end:]])


def on_page_content(html: str, page: Any, config: Any, files: Files) -> None:
    """Take note of links to other sites."""
    for link in EXTERNAL.findall(html):
        _external.setdefault(link, page.file.src_uri)


def on_post_page(output: str, page: Any, config: Any) -> None:
    """Warn, which ``--strict`` makes an error, of what a page loads from other sites."""
    for url in LOADED.findall(output):
        _log.warning("%s loads %s, which is not in the site", page.file.src_uri, url)


def on_post_build(config: Any) -> None:
    """List links to other sites."""
    lines = [f"{link} ({page})\n" for link, page in sorted(_external.items())]
    Path(config.site_dir, "external-links.txt").write_text("".join(lines), encoding="utf-8")
