"""The optimizers: order of a step, options, state and reports."""

from fop.optim.fop import FOP
from fop.optim.kfac import KFAC

__all__ = ["FOP", "KFAC"]
