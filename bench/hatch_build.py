"""The optimizer of the same version, with what its extra ``bench`` holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Together(MetadataHookInterface):
    """One version for both packages."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the dependency."""
        text = Path(self.root, "../src/fop/__init__.py").read_text(encoding="utf-8")
        version = text.partition('__version__ = "')[2].partition('"')[0]
        metadata["dependencies"] = [f"fop-optim[bench]=={version}"]
