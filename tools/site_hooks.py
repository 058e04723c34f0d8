"""Hooks of mkdocs: pages and pictures from outside docs/, links that leave the site, notebooks as pages.

The files keep links that work on GitHub. A link to a file of the repository that is no page of the site
becomes one to its source there; a link to no file at all is a warning, which ``--strict`` makes an error.
"""

from __future__ import annotations

import base64
import json
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/fop-optim/fop-optim"
OUTSIDE = ["CHANGELOG.md", "CONTRIBUTING.md", "records/*/*.md", "records/*/*.png"]
LINK = re.compile(r"(!?\[(?:[^\[\]]|!?\[[^\]]*\](?:\([^)]*\))?)*\])\(([^()\s]+?)(#[^()\s]*)?\)")
FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1`*\s*?$", re.MULTILINE | re.DOTALL)
log = logging.getLogger("mkdocs.site_hooks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/, and a page for every notebook in docs/tutorials."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    for path in sorted((ROOT / "docs/tutorials").glob("*.ipynb")):
        name = path.relative_to(ROOT / "docs").as_posix()
        if (plain := files.get_file_from_path(name)) is not None:
            files.remove(plain)
        for page in converted(path, name, config):
            files.append(page)
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the notebooks into the navigation, below the page that introduces them."""
    books = sorted((ROOT / "docs/tutorials").glob("*.ipynb"))
    for entry in config.nav or []:
        if isinstance(entry, dict) and "Tutorials" in entry and books:
            pages = [{title(path): f"tutorials/{path.stem}.md"} for path in books]
            entry["Tutorials"] = [{"Overview": "tutorials/index.md"}, *pages]
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links into files of the repository into links to pages of the site, or to GitHub."""
    source = page.file.src_uri
    outside = source.startswith("records/") or source in OUTSIDE
    folder = posixpath.dirname(source if outside else f"docs/{source}")

    def moved(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"[a-z]+:|[/#]", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if files.get_file_from_path(posixpath.normpath(posixpath.join(posixpath.dirname(source), target))):
            return match[0]
        name = path.removeprefix("docs/").replace(".ipynb", ".md")
        if files.get_file_from_path(name):
            return f"{text}({posixpath.relpath(name, posixpath.dirname(source) or '.')}{anchor})"
        if not (ROOT / path).exists():
            log.warning("%s has a link to %s, and there is no such file", source, target)
            return match[0]
        kind = "tree" if (ROOT / path).is_dir() else "raw" if text.startswith("!") else "blob"
        return f"{text}({REPOSITORY}/{kind}/main/{path}{anchor})"

    parts, end = [], 0
    for code in FENCE.finditer(markdown):
        parts += [LINK.sub(moved, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, LINK.sub(moved, markdown[end:])])


# --- Notebooks


def cells(path: Path) -> list[dict[str, Any]]:
    """Return the cells of a notebook."""
    return list(json.loads(path.read_text(encoding="utf-8"))["cells"])


def title(path: Path) -> str:
    """Return the first heading of a notebook, or its file's name."""
    for cell in cells(path):
        if cell["cell_type"] == "markdown" and (
            found := re.search(r"^# (.+)$", joined(cell["source"]), re.M)
        ):
            return found[1].strip()
    return path.stem


def joined(text: str | list[str]) -> str:
    """Return text that a notebook may hold in lines."""
    return text if isinstance(text, str) else "".join(text)


def fenced(text: str, language: str) -> str:
    """Return a block of code; the fence is longer than any in the text."""
    longest = max(map(len, re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def converted(path: Path, name: str, config: MkDocsConfig) -> list[File]:
    """Return a page with the cells and outputs of a notebook as they were saved, and its pictures."""
    parts, pictures = [], []
    stem = name.removesuffix(".ipynb")
    for cell in cells(path):
        source = joined(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        if cell["cell_type"] != "code" or not source.strip():
            continue
        parts.append(fenced(source, "python"))
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{stem}-{len(pictures)}.png"
                content = base64.b64decode(joined(data["image/png"]))
                pictures.append(File.generated(config, picture, content=content))
                parts.append(f"![Output]({posixpath.basename(picture)})")
            elif "text/html" in data:
                parts.append(f'<div class="output" markdown="0">\n{joined(data["text/html"])}\n</div>')
            elif text := joined(output.get("text", "") or data.get("text/plain", "")):
                parts.append(fenced(text, "{ .text .output }"))
    source = f"{REPOSITORY}/blob/main/docs/{name}"
    parts.append(f"[This page as a notebook]({source})")
    return [File.generated(config, f"{stem}.md", content="\n\n".join(parts) + "\n"), *pictures]
