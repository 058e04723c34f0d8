"""Fisher-Orthogonal Projection (Lu & Armour, AAAI 2026) and K-FAC for PyTorch, in one line."""

from fop import presets
from fop.optimizer import FOP, KFAC

__all__ = ["FOP", "KFAC", "__version__", "presets"]

__version__ = "0.1.0"
