"""`torch.nn.Linear`, and GPT-2's `Conv1D`, with any number of leading dimensions."""

from __future__ import annotations

from torch import Tensor, nn

from fop.layers.base import LayerOptions, RowLayer


class LinearLayer(RowLayer):
    """Rows of A are the input rows (with a 1 for the bias), rows of G the output gradients.

    Args:
        out_dim: number of outputs.
        in_dim: number of inputs.
        bias: whether the bias belongs to the block.
        options: the layer's options.
        transposed: whether the weight is stored as (in, out).
    """

    groups = 1

    def __init__(
        self, out_dim: int, in_dim: int, *, bias: bool, options: LayerOptions, transposed: bool = False
    ) -> None:
        self.out_dim = out_dim
        self.in_dim = in_dim
        self.bias = bias
        self.options = options
        self.transposed = transposed

    @classmethod
    def of(cls, module: nn.Linear, *, bias: bool, options: LayerOptions) -> LinearLayer:
        """Return the layer of a `torch.nn.Linear`."""
        return cls(module.out_features, module.in_features, bias=bias, options=options)

    @classmethod
    def of_conv1d(cls, module: nn.Module, *, bias: bool, options: LayerOptions) -> LinearLayer:
        """Return the layer of a Hugging Face `Conv1D`, whose weight is (in, out)."""
        in_dim, out_dim = module._parameters["weight"].shape  # type: ignore[union-attr]
        return cls(out_dim, in_dim, bias=bias, options=options, transposed=True)

    def leading_dims(self, x: Tensor) -> int:
        return x.dim() - 1

    def gradient(self, x: Tensor, b: Tensor) -> Tensor:
        x_RI, b_RO = x.flatten(0, -2), b.flatten(0, -2)
        weight = b_RO.T @ x_RI.to(b.dtype)
        return self.to_matrix(weight.T if self.transposed else weight, b_RO.sum(0) if self.bias else None)

    def input_columns(self, x: Tensor) -> Tensor:
        return (
            x.reshape(x.shape[0], 1, -1, x.shape[-1]).mT if x.numel() else x.new_zeros(0, 1, self.in_dim, 1)
        )

    def output_columns(self, b: Tensor) -> Tensor:
        return (
            b.reshape(b.shape[0], 1, -1, b.shape[-1]).mT if b.numel() else b.new_zeros(0, 1, self.out_dim, 1)
        )

    def weight_matrix(self, weight: Tensor) -> Tensor:
        return (weight.T if self.transposed else weight)[None]

    def weight_from_matrix(self, matrix: Tensor, shape: object) -> Tensor:
        return matrix[0].T if self.transposed else matrix[0]


def unsupported_linear(module: nn.Linear) -> str | None:
    """Return why a Linear cannot take the FOP step, or None if it can."""
    if type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} overrides Linear.forward"
    return None
