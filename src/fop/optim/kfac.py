"""K-FAC under its own name."""

from __future__ import annotations

from typing import Any

from fop.optim.fop import FOP
from fop.optim.options import DEFAULTS, ParamsLike


class KFAC(FOP):
    """K-FAC: `FOP` with ``beta=0.0`` and ``eta=1.0``, so that no second gradient is computed.

    Args:
        params: as for `FOP`.
        lr: as for `FOP`.
        options: every keyword of `FOP` except ``beta`` and ``eta``.

    Raises:
        TypeError: for an unknown keyword, ``beta`` or ``eta``.
        ValueError: as `FOP`.
    """

    def __init__(self, params: ParamsLike, lr: float = DEFAULTS["lr"], **options: Any) -> None:
        fixed = sorted({"beta", "eta"} & options.keys())
        if fixed:
            raise TypeError(f"KFAC has beta=0.0 and eta=1.0; got {', '.join(fixed)}. Use FOP to set them.")
        super().__init__(params, lr, beta=0.0, eta=1.0, **options)
