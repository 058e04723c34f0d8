"""The optimizers that are compared, ours and others', each one entry of a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import distributions
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, AdamW, Optimizer

from fop import FOP, KFAC

Loss = Callable[[Tensor, Tensor], Tensor]  # given outputs and targets
BENCH, EXTRA = (f"pip install 'fop-optim[{extra}]'" for extra in ("bench", "peers"))


@dataclass(frozen=True)
class Peer:
    """An optimizer to compare: ``build(model, lr=..., **options)`` makes it for all of a model's parameters.

    What it returns has ``param_groups``, ``zero_grad`` and ``step``. If it has ``gradients(model, inputs,
    targets, loss)``, that takes the place of the forward and backward pass and returns the loss.
    """

    label: str
    build: Callable[..., Optimizer]
    interval: str | None = None  # the option that says every how many steps the curvature is updated
    install: str = BENCH


class MissingPeerError(ValueError):
    """The library of a peer cannot be imported; the message says what installs it."""


def make_peer(
    name: str, model: nn.Module, lr: float, *, interval: int | None = None, **options: Any
) -> Optimizer:
    """Build the optimizer of an entry of `PEERS`, its curvature updated every ``interval`` steps.

    Raises ValueError for a name that is not there, MissingPeerError where its library is not installed.
    """
    if name not in PEERS:
        raise ValueError(f"unknown optimizer {name!r}; known are {', '.join(PEERS)}")
    peer = PEERS[name]
    if interval is not None and peer.interval is not None:
        options[peer.interval] = interval
    try:
        return peer.build(model, lr=lr, **options)
    except ImportError as error:
        raise MissingPeerError(f"{peer.label} cannot be imported ({error}): {peer.install}") from error


def installed() -> dict[str, str]:
    """Return the versions of others' libraries that are installed."""
    names = {"pytorch-optimizer", "kfac-pytorch", "singd", "asdfghjkl"}
    found = {each.name.replace("_", "-"): each.version for each in distributions()}
    return {name: found[name] for name in sorted(names & found.keys())}


def class_loss(outputs: Tensor, targets: Tensor, **how: Any) -> Tensor:
    """Return the cross-entropy of logits (..., classes) and class numbers (...), by default its mean."""
    return cross_entropy(outputs.flatten(0, -2), targets.flatten(), **how)


def gradients(
    optimizer: Optimizer,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Loss = cross_entropy,
    bf16: bool = False,
) -> Tensor:
    """Put the gradients of a batch where ``optimizer.step()`` takes them; return the loss.

    With ``bf16`` the forward pass runs under autocast.
    """
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
        if hasattr(optimizer, "gradients"):
            return optimizer.gradients(model, inputs, targets, loss).detach()
        outputs = model(inputs)
        if optimizer.param_groups[0].get("fisher") == "model":
            assert isinstance(optimizer, FOP)
            likelihood = "gaussian" if loss is mse_loss else "categorical"
            outputs = optimizer.sample_labels(outputs, likelihood, dim=-1)
        value = loss(outputs, targets)
    value.backward()
    return value.detach()


class Joined(Optimizer):
    """Several optimizers that step one after the other; their groups are this one's groups."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts
        super().__init__([dict(group) for group in self._groups()], {})
        self.param_groups = self._groups()  # not copies: schedulers change the parts' own

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in getattr(part, "param_groups", ())]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups()


def _library(package: str, name: str, model: nn.Module, lr: float, **options: Any) -> Optimizer:
    kind = getattr(import_module(package), name)  # here, because it takes seconds
    return kind(model.parameters(), lr=lr, **options)


def _muon(model: nn.Module, lr: float, adamw_lr: float = 1e-3, **options: Any) -> Optimizer:
    """Give Muon the hidden weights; its authors leave embeddings, last layer, gains and biases to AdamW.

    torch's own on GPUs, for matrices. On a CPU, where its bfloat16 may be emulated (50 times slower), and for
    convolutions, pytorch-optimizer's, whose defaults both have here; on a CPU with its iteration in float32.
    """
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    last = [module.weight for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    left = set(map(id, embeddings + last))
    # Positions and class tokens are not called weights.
    weights = [p for name, p in model.named_parameters() if p.ndim >= 2 and name.endswith("weight")]
    hidden = [p for p in weights if id(p) not in left]
    others = _without(model, hidden)
    on_cpu = others[0].device.type == "cpu"
    if hasattr(torch.optim, "Muon") and all(p.ndim == 2 for p in hidden) and not on_cpu:
        adamw = AdamW(others, lr=adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        return Joined(torch.optim.Muon(hidden, lr=lr, **{"weight_decay": 0.0, **options}), adamw)
    from pytorch_optimizer import Muon

    if on_cpu:
        base, matrix = map(
            import_module, (f"pytorch_optimizer.optimizer.{of}" for of in ("muon.base", "utils.matrix"))
        )
        iteration = "zero_power_via_newton_schulz_5"
        vars(base)[iteration] = partial(getattr(matrix, iteration), dtype=torch.float32)
    groups = [
        {"params": hidden, "use_muon": True, "lr": lr, **options},
        {"params": others, "use_muon": False, "lr": adamw_lr},
    ]
    return Muon(groups, lr=lr, adamw_lr=adamw_lr)


def _without(model: nn.Module, taken: Sequence[Tensor]) -> list[nn.Parameter]:
    ids = set(map(id, taken))
    return [p for p in model.parameters() if id(p) not in ids]


def _kfac_pytorch(
    model: nn.Module, lr: float, interval: int = 1, momentum: float = 0.9, **options: Any
) -> Optimizer:
    sgd = SGD(model.parameters(), lr=lr, momentum=momentum)
    options |= {"factor_update_steps": interval, "inv_update_steps": interval}
    kind = import_module("kfac.preconditioner").KFACPreconditioner
    return Joined(kind(model, lr=lambda step: sgd.param_groups[0]["lr"], **options), sgd)


def _singd(model: nn.Module, lr: float, adamw_lr: float = 1e-3, **options: Any) -> Optimizer:
    """Give what is in no linear layer or convolution, which SINGD would leave as it is, to AdamW."""
    singd = import_module("singd.optim.optimizer").SINGD(model, lr=lr, warn_unsupported=False, **options)
    others = _without(model, [p for group in singd.param_groups for p in group["params"]])
    return Joined(singd, *([AdamW(others, lr=adamw_lr, fused=True)] if others else []))


class _Asdl(Joined):
    """ASDL's K-FAC, which makes preconditioned gradients in place of a backward pass, for SGD."""

    def __init__(
        self, model: nn.Module, lr: float, interval: int = 1, momentum: float = 0.9, **options: Any
    ) -> None:
        asdl = import_module("asdl.precondition")
        if torch.version.cuda is None:
            # It names its operations for NVIDIA's profiler, which torch for CPUs refuses.
            for module in ("asdl.operations.operation", "asdl.precondition.natural_gradient"):
                vars(import_module(module))["nvtx"] = SimpleNamespace(range=lambda *names: nullcontext())
        # The average of the others; without it there is none, and embeddings are an error.
        usual = {"damping": 1e-3, "ema_decay": 0.05, "ignore_modules": [nn.Embedding]}
        usual |= {"preconditioner_upd_interval": interval, "curvature_upd_interval": interval}
        self.config = asdl.PreconditioningConfig(**{**usual, **options})
        self.maker = asdl.KfacGradientMaker(model, self.config, fisher_type="fisher_emp")
        super().__init__(SGD(model.parameters(), lr=lr, momentum=momentum))

    def gradients(self, model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss) -> Tensor:
        self.config.data_size = len(targets)
        self.maker.setup_loss_call(loss, self.maker.setup_model_call(model, inputs), targets)
        return self.maker.forward_and_backward()[1]


# By name. An entry of your own, PEERS["mine"] = Peer(...), is compared like the others.
PEERS: dict[str, Peer] = {
    "sgd": Peer("SGD", partial(_library, "torch.optim", "SGD", momentum=0.9, nesterov=True)),
    "adamw": Peer("AdamW", partial(_library, "torch.optim", "AdamW", fused=True)),
    # Recipes and records are of the paper's steps.
    "kfac": Peer("K-FAC", partial(KFAC, step_length="paper"), "curvature_interval"),
    "fop": Peer("FOP", partial(FOP, step_length="paper"), "curvature_interval"),
    "lamb": Peer("LAMB", partial(_library, "pytorch_optimizer", "Lamb")),
    "muon": Peer("Muon", _muon),
    "soap": Peer("SOAP", partial(_library, "pytorch_optimizer", "SOAP"), "precondition_frequency"),
    "shampoo-blocks": Peer(
        "Shampoo in blocks",
        partial(_library, "pytorch_optimizer", "ScalableShampoo", start_preconditioning_step=1),
        "preconditioning_compute_steps",
    ),
    "kfac-pytorch": Peer(
        "kfac-pytorch",
        _kfac_pytorch,
        "interval",
        "pip install git+https://github.com/gpauloski/kfac-pytorch",
    ),
    "singd": Peer("SINGD", _singd, "T", EXTRA),
    "asdl": Peer("ASDL K-FAC", _Asdl, "interval", EXTRA),
}
