"""Imports an installed fop and takes one step; run outside the clone, to see whether a wheel is whole."""

import platform
from importlib.metadata import version
from pathlib import Path

import torch

import fop

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2))
optimizer = fop.FOP(model.parameters())
before = [weight.detach().clone() for weight in model.parameters()]
torch.nn.functional.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.arange(8) % 2).backward()
optimizer.step()
assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
assert fop.__version__ == version("fop-optim")
assert Path(fop.__file__).with_name("py.typed").exists()
print(optimizer.summary())
print(f"fop {fop.__version__}, torch {torch.__version__}, Python {platform.python_version()}: {fop.__file__}")
