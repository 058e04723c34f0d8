"""Options for a purpose, for ``FOP`` and ``KFAC``: ``FOP(model, **presets.fine_tuning)``.

Plain dicts, with the reason below each. To change one of their options:
``FOP(model, **presets.fine_tuning | {"lr": 0.05})``.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

paper: dict[str, Any] = {
    "lr": 0.05,
    "step_length": "paper",
    "damping": 1e-4,
    "curvature_interval": 150,
    "statistics_rows": None,
    "layer_options": {nn.Module: {"block_dim": sys.maxsize}},
}
"""The paper's equations, ``step_length="paper"``, and its typical values (Lu & Armour, AAAI 2026).

Rate, damping and interval are the paper's, statistics are of all rows, and no factor is in blocks. It names
no momentum, decay or clip: those are ours. ``FOP.paper(model, lr=0.05)`` is the same, and adds to
``layer_options``.
"""

fine_tuning: dict[str, Any] = {"lr": 0.02, "adamw_lr": 1e-3}
"""A tenth of the default rate, for a pre-trained network; a schedule that ends near 0 belongs with it.

Measured on two small networks with rates from 0.01 to 0.2 (records/fine-tuning): best on text, 1.664 nats a
byte to 1.767 at 0.2, and within a point of the best on images.
"""

large_batch: dict[str, Any] = {"lr": 0.2, "adamw_lr": 0.03, "damping": "adaptive"}
"""The options that matter with few steps of many samples, by name: today they are the defaults.

Measured (records/race): 72.1 % on CIFAR-10 at batch 5,000 in 30 steps, and 1.65 nats a byte of a small GPT at
65,536 tokens in 60, where Muon at its best rate ends at 71.4 % and 1.88 nats.
"""
