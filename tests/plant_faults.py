"""Plants faults in a copy of `src` one by one, and asks the tests named for each to notice.

``python tests/plant_faults.py`` plants all, ``... NAME ...`` those whose names contain one of the words. A fault
whose text is no longer in its file is an error: write it anew where the code has moved.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in a file below src/fop; one of these tests must fail."""

    file: str
    old: str
    new: str
    tests: str


LAYERS = "layers/test_every_kind.py"
SUMS = "layers/test_matrices_and_sums.py"
INVERSES, EQUATIONS = "curvature/test_inverses.py", "curvature/test_equations.py"
FALLBACK = "curvature/test_inversion_fallback.py"
ORACLE, PASSES, CHANGED = (
    "steps/test_oracle.py",
    "steps/test_accumulation.py",
    "steps/test_changed_gradients.py",
)
HOOKS, BATCH = "capture/test_passes_and_hooks.py", "capture/test_batch_dimension.py"
LIFETIME, MOVES, COMPILE = (
    "capture/test_copies_and_lifetime.py",
    "capture/test_moves.py",
    "capture/test_compile.py",
)
PRECISION, NONFINITE, READS = (
    "steps/test_mixed_precision.py",
    "steps/test_nonfinite.py",
    "steps/test_host_reads.py",
)

FAULTS: dict[str, Fault] = {
    # Equations
    "rounding taken for G⊥": Fault(
        "algebra/projection.py",
        "torch.where(inner(apart, apart) <= rounding, 0.0, difference - s * average)",
        "difference - s * average",
        EQUATIONS,
    ),
    "Euclidean projection": Fault(
        "algebra/projection.py",
        "s = _ratio(inner(difference, fisher_average), inner(average, fisher_average), otherwise=0.0)",
        "s = _ratio(inner(difference, average), inner(average, average), otherwise=0.0)",
        EQUATIONS,
    ),
    "η* without a 2": Fault("algebra/projection.py", "B + 2 * beta * D", "B + beta * D", EQUATIONS),
    "ε in β*": Fault(
        "algebra/projection.py", "return _ratio(D, E, otherwise=0.0)", "return D / (E + 1e-12)", EQUATIONS
    ),
    "ρ of the fixed β": Fault("algebra/projection.py", "_ratio(best * D, B", "_ratio(mixing * D, B", EQUATIONS),
    "alignment without η": Fault("algebra/projection.py", "eta * B, zero", "B, zero", EQUATIONS),
    "A transposed": Fault("algebra/kronecker.py", "else V @ A\n", "else V @ A.mT\n", INVERSES),
    "π upside down": Fault("algebra/kronecker.py", "return gamma * pi, gamma / pi", "return gamma / pi, gamma * pi", INVERSES),
    "inverse holds the batch": Fault("algebra/kronecker.py", "part.clone() if len(indices) > 1 else part", "part", INVERSES),
    "too much damping": Fault("algebra/kronecker.py", "* 10.0**attempt", "* 100.0**attempt", INVERSES),
    "infinite factor": Fault(
        "algebra/kronecker.py", "finite = torch.isfinite(damped) & torch.isfinite(inverse)", "finite = torch.isfinite(inverse)", INVERSES
    ),
    # Layers
    "uses counted as samples": Fault("layers/statistics.py", "self.samples = max(self.samples, other.samples)", "self.samples += other.samples", LAYERS),
    "sum taken for a mean": Fault("layers/statistics.py", 'g = self.g * N if reduction == "mean" else self.g / N', "g = self.g * N", LAYERS),
    "tied without the root": Fault("layers/statistics.py", "return _scaled(joined, total.sqrt())", "return _scaled(joined, total)", LAYERS),
    "reduce averages gradients": Fault("layers/base.py", "g_columns = g_columns.sum(-1", "g_columns = g_columns.mean(-1", LAYERS),
    "no one for the bias": Fault("layers/base.py", "total[:, -1, -1] += columns_GDR.shape[-1]", "pass", LAYERS),
    "odd padding in front": Fault("layers/conv.py", "(total // 2, total - total // 2)", "(total - total // 2, total // 2)", LAYERS),
    "padding token": Fault("layers/embedding.py", "b_RD = b_RD.masked_fill((ids == self.padding_idx)[:, None], 0)", "pass", LAYERS),
    "rows of other groups": Fault("layers/attention.py", "sums.rows * reached", "sums.rows", LAYERS),
    "running averages in training": Fault("layers/norm.py", "if module.training or module.running_mean is None:", "if module.running_mean is None:", LAYERS),
    "half precision sums": Fault("layers/base.py", "return torch.promote_types(x.dtype, torch.float32)", "return x.dtype", SUMS),
    # Capture
    "halves of equal share": Fault("capture/window.py", "share = self._ratio_of // 2 / self._ratio_of", "share = 0.5", PASSES),
    "passes of equal weight": Fault("capture/window.py", 'counts = self._passes if reduction == "mean" else self._samples', "counts = self._passes", PASSES),
    "sign of a sub-batch": Fault("capture/window.py", "alpha=1 if label else -1", "alpha=1", PASSES),
    "passes not split alike": Fault("capture/window.py", "samples // 2 * first == first // 2 * samples > 0", "samples > 1", PASSES),
    "scale not followed": Fault("capture/window.py", "S1 = self._half.to(average.dtype) * scale.to(average.dtype)", "S1 = self._half.to(average.dtype)", CHANGED),
    "blind to signs": Fault("capture/window.py", "along = _component(self._layer.weight_matrix(flat), S1)", "pass", CHANGED),
    "blind to other paths": Fault("capture/window.py", "<= tolerance**2 * parts", "<= 1e9 * parts", CHANGED),
    "blind to what was there": Fault("capture/window.py", "vetoes = [self.clean, complete]", "vetoes = [complete]", PASSES),
    "one batch for two": Fault("capture/window.py", "if other.samples != self.samples:", "if False:", "steps/test_several_losses.py"),
    "graph used once": Fault("capture/hooks.py", "if not _graph_is_kept():", "if True:", "steps/test_several_losses.py " + HOOKS),
    "view cut off": Fault("capture/hooks.py", "source = base if base is not None and base.numel() == output.numel() else output", "source = output", "layers/test_inputs.py"),
    "activation kept": Fault("capture/hooks.py", "            self._kept = None\n", "            pass\n", LIFETIME),
    "changed input used": Fault("capture/hooks.py", "        return kept.saved_tensors[0]", "        return kept._raw_saved_tensors[0].data", PRECISION),
    "batched backward": Fault("capture/hooks.py", "and not _is_batched(b)", "", HOOKS),
    "copies feed": Fault("capture/lifetime.py", "        return _nothing()\n\n    def __reduce__", "        return self\n\n    def __reduce__", LIFETIME),
    "pickle names the library": Fault("capture/lifetime.py", 'return getattr, (contextlib.nullcontext(), "__exit__")', "return _nothing, ()", LIFETIME),
    "positions are samples": Fault("capture/batch.py", "if isinstance(layer, EmbeddingLayer) and self._positions(x):", "if False:", BATCH),
    "length taken for N": Fault("capture/batch.py", "if len(along) == 1:", "if along:", BATCH),
    "windows not folded": Fault("capture/batch.py", "self.size, self.rows = model.size, self.size // model.size", "pass", BATCH),
    "hooks not put back": Fault("capture/layer.py", "return all(use.intact(self.weight) for use in self._uses)", "return True", MOVES),
    "leftovers of other passes": Fault("capture/layer.py", "            self._parts.clear()\n            self._open_window()", "            self._open_window()", HOOKS),
    "zeros are unknown": Fault("capture/layer.py", "self.window.clean = gradient.count_nonzero() == 0", "self.window.clean = gradient.count_nonzero() < 0", PASSES),
    "autocast in statistics": Fault("capture/layer.py", "with torch.autocast(b.device.type, enabled=False):", "if True:", PRECISION),
    # The optimizer
    "β of a lost pair": Fault("optim/block.py", "direction._replace(beta=torch.where(pair.trusted, direction.beta, 0))", "direction", CHANGED),
    "KL clip of lr": Fault("optim/block.py", "direction.alignment * rate**2", "direction.alignment * rate", ORACLE),
    "scale lost": Fault("optim/gradients.py", "            return scaler._scale", "            return None", PRECISION),
    "NaN statistics taken": Fault("optim/curvature.py", "finite = torch.stack([_finite(*pair).to(home) for pair in fresh]).tolist()", "finite = [True for _ in fresh]", FALLBACK + " " + NONFINITE),
    "one inverse replaced alone": Fault("optim/curvature.py", "if A.inverse is not None and G.inverse is not None:", "if G.inverse is not None:", FALLBACK),
    "first estimate decayed": Fault("optim/curvature.py", "if known and key in state else new", "if known and key in state else (1 - decay) * new", ORACLE),
    "AdamW after a refused start": Fault("optim/engine.py", "block.by_adamw = not (block.ready or block in refused)", "block.by_adamw = not block.ready", NONFINITE),
    "NaN times zero": Fault("optim/update.py", "update = torch.where(fine, part * scale.to(part.device, part.dtype), 0)", "update = part * scale.to(part.device, part.dtype) * fine", NONFINITE),
    "refused layers clip": Fault("optim/update.py", "total = torch.where(finite, lengths, 0).sum()", "total = lengths.nansum()", NONFINITE),
    "decay of a refused step": Fault("optim/update.py", 'rate = _if(fine, group["lr"], 0.0, part)', 'rate = _if(fine, group["lr"], group["lr"], part)', NONFINITE),
    "momentum not carried": Fault("optim/update.py", 'momentum = group["momentum"] * _carried(group)', 'momentum = group["momentum"]', "steps/test_momentum_and_clip.py"),
    "nesterov": Fault("optim/update.py", 'part = torch.add(part, buffer, alpha=group["momentum"]) if group["nesterov"] else buffer', "part = buffer", ORACLE),
    "waits for the device": Fault("optim/update.py", "finite = torch.isfinite(lengths)\n", "finite = torch.isfinite(lengths)\n    bool(finite.all())\n", READS),
}  # fmt: skip


def notices(fault: Fault, folder: Path) -> bool:
    """Whether one of the tests of ``fault`` fails with it, and not for want of the text."""
    src = folder / "src"
    shutil.rmtree(src, ignore_errors=True)
    shutil.copytree(ROOT / "src", src)
    file = src / "fop" / fault.file
    text = file.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise SystemExit(f"{fault.file} has {text.count(fault.old)} times: {fault.old}")
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    files = [str(ROOT / "tests" / name) for name in fault.tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    env = {**os.environ, "PYTHONPATH": str(src), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print(f"    {failed[0][:140] if failed else done.stdout.splitlines()[-1:]}", flush=True)
    return done.returncode == 1 and bool(failed)


def main(words: list[str]) -> int:
    """Plant the chosen faults; returns how many went unnoticed."""
    chosen = {
        name: fault for name, fault in FAULTS.items() if not words or any(word in name for word in words)
    }
    unnoticed = []
    with tempfile.TemporaryDirectory() as folder:
        for name, fault in chosen.items():
            print(name, flush=True)
            if not notices(fault, Path(folder)):
                unnoticed.append(name)
    print(f"{len(chosen) - len(unnoticed)} of {len(chosen)} noticed; unnoticed: {unnoticed}")
    return len(unnoticed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
