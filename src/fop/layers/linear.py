"""`torch.nn.Linear` with any number of leading dimensions (K-FAC-expand: every position is a row)."""

from __future__ import annotations

from torch import Tensor, nn

from fop.layers.base import FactorSums, Layer, statistics_dtype, with_ones


class LinearLayer(Layer):
    """Rows of A are the input rows (with a 1 for the bias), rows of G the output gradients."""

    def __init__(self, module: nn.Linear, *, bias: bool) -> None:
        self.groups = 1
        self.out_dim = module.out_features
        self.in_dim = module.in_features
        self.bias = bias

    def batched(self, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return (x[None], b[None]) if x.dim() == 1 else (x, b)

    def gradient(self, x: Tensor, b: Tensor) -> Tensor:
        x_ri, b_ro = x.flatten(0, -2), b.flatten(0, -2)
        weight = b_ro.T @ x_ri.to(b.dtype)
        return self.to_matrix(weight, b_ro.sum(0) if self.bias else None)

    def factor_sums(self, x: Tensor, b: Tensor) -> FactorSums:
        dtype = statistics_dtype(b)
        x_ri, b_ro = x.flatten(0, -2).to(dtype), b.flatten(0, -2).to(dtype)
        a = x_ri.T @ x_ri
        if self.bias:
            a = with_ones(a, x_ri.sum(0), x_ri.shape[0])
        return FactorSums(a[None], (b_ro.T @ b_ro)[None], x.shape[0], x_ri.shape[0])


def unsupported_linear(module: nn.Linear) -> str | None:
    """Return why a Linear cannot take the FOP step, or None if it can."""
    if type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} overrides Linear.forward"
    return None
