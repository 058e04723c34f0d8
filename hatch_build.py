"""What pyproject.toml cannot say: the README as an index shows it, and a command in clones alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

REPOSITORY = "https://github.com/fop-optim/fop-optim"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?![a-z]+:|#)([^()\s]+)\)")


def absolute(text: str) -> str:
    """Return Markdown whose links and pictures work outside the repository."""

    def moved(match: re.Match[str]) -> str:
        kind = "raw" if match[1] else "blob"
        return f"{match[1]}[{match[2]}]({REPOSITORY}/{kind}/main/{match[3]})"

    return LINK.sub(moved, text)


class Readme(MetadataHookInterface):
    """README.md with absolute links, as the long description."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the long description."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text)}


class Command(BuildHookInterface):
    """`fop-bench` for ``pip install -e`` in a clone, where src/fop_bench is; wheels hold src/fop alone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the command to an editable install."""
        if version == "editable":
            build_data["shared_scripts"][str(Path(self.root, "tools", "fop-bench"))] = "fop-bench"
