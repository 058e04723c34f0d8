"""The gradients of the K sub-batches of one weight, from the backward passes between two steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from fop.correction import SubBatchGradients, contrasts
from fop.layers import Layer, Reduction, Statistics

# A gradient that was scaled as a whole reproduces its scaled norms to rounding; clipping single elements or
# adding noise moves them far more. Lenient enough for a float16 round trip.
_SAME_DIRECTION = 1e-3
# How far p.grad may be from what the hooks saw before it counts as having other terms; in half precision
# autograd and the hooks round differently.
_SAME_SUM, _SAME_SUM_HALF = 1e-2, 5e-2

EMPTY = "its batch is empty"
_CHANGED = (
    "p.grad is not what the layer's own backward pass gave (changed since, not finite, not zeroed before, "
    "or other paths in the loss)"
)


class Scaling(NamedTuple):
    """By what a gradient was multiplied since its backward pass, and whether that is all, 0-dim both."""

    scale: Tensor
    alone: Tensor


@dataclass
class SplitSums:
    """Σ b āᵀ of split passes: of each of the first K - 1 sub-batches, and with statistics of the whole batch.

    ``first`` is empty where the sub-batches are not known.
    """

    first: list[Tensor] = field(default_factory=list)
    whole: Tensor | None = None

    def add(self, other: SplitSums) -> None:
        """Add the sums of other uses or passes."""
        if self.first and other.first:
            self.first = [a + b for a, b in zip(self.first, other.first, strict=True)]
        else:
            self.first = self.first or other.first
        if other.whole is not None:
            self.whole = other.whole if self.whole is None else self.whole + other.whole


@dataclass
class PassRecord:
    """What one backward pass gave, which may use the weight several times.

    Attributes:
        problem: why the pass cannot be split into sub-batches, None if it can.
        precise: whether b has more than half precision.
        statistics: of the curvature, None if none are due.
    """

    samples: int
    problem: str | None = None
    precise: bool = True
    sums: SplitSums = field(default_factory=SplitSums)
    statistics: Statistics | None = None

    def add_use(self, other: PassRecord) -> None:
        """Add another use of the weight in the same backward pass."""
        if other.samples != self.samples:
            self.problem = f"its uses have batches of {self.samples} and {other.samples}"
        self.problem = self.problem or other.problem
        self.samples = max(self.samples, other.samples)
        self.precise &= other.precise
        self.sums.add(other.sums)
        if self.statistics is None:
            self.statistics = other.statistics
        elif other.statistics is not None:
            self.statistics.add(other.statistics, same_samples=True)


@lru_cache(maxsize=256)
def sub_batch_runs(samples: int, count: int, rows: int = 1) -> list[list[slice]]:
    """Return which runs of a dimension with ``rows`` for each of N samples the K sub-batches have.

    Of K² runs number i goes where the sum of its digits in base K says: A B B A for K = 2. A batch may come
    in blocks, as chosen before rejected answers, or with both in turn: each sub-batch has both alike. A run
    is a view, and single samples would have to be copied.
    """
    runs: list[list[slice]] = [[] for _ in range(count)]
    sizes, start = sub_batch_sizes(samples, count), 0
    for turn in range(count):
        for place in range(count):
            k = (turn + place) % count
            end = start + rows * (sizes[k] * (turn + 1) // count - sizes[k] * turn // count)
            if runs[k] and runs[k][-1].stop == start:
                start = runs[k].pop().start
            if end > start:
                runs[k].append(slice(start, end))
            start = end
    return runs


@lru_cache(maxsize=256)
def sub_batch_sizes(samples: int, count: int) -> list[int]:
    """Return how many of N samples each of the K sub-batches has."""
    return [samples // count + (k < samples % count) for k in range(count)]


class SubBatches:
    """What is known of the sub-batches since the weight's gradient was last None or zero.

    Every backward pass is split in K, by sample. Where a pass cannot be split in the ratio of those before,
    these become one sub-batch, and the sub-batches take turns from then on. Passes that the user has labelled
    are sub-batches as they are.

    Attributes:
        clean: 0-dim bool, false if p.grad held something unknown before the first pass; None if it was None.
        complete: 0-dim bool, whether p.grad is all that the hooks saw; None where that was not looked at.
        split: whether the running backward pass is to be split.
        sums: of the split passes.
        measures: what `measure` gave of the gradients as autograd left them.
    """

    def __init__(self, layer: Layer, params: Sequence[Tensor], count: int) -> None:
        self.clean: Tensor | None = None
        self.complete: Tensor | None = None
        self.split = True
        self.sums = SplitSums()
        self.measures: dict[Tensor, list[Tensor]] = {}
        # The parameters are the weight, and the bias if it belongs to the weight's layer.
        self._layer, self._params, self.count = layer, params, count
        self._reason: str | None = None
        self._dropped = self._labelled = False
        # Whether all output gradients had more than half precision.
        self._precise = True
        # N of the first split pass.
        self._ratio_of = 0
        # Whole passes: the sub-batch of the last one, passes and samples of each sub-batch, and the gradient
        # of each of the first K - 1, less p.grad if the last pass was of it.
        self._label = 0
        self._passes, self._samples = [0] * count, [0] * count
        self._earlier: list[dict[Tensor, Tensor]] = [{} for _ in range(count - 1)]

    def begin(self, samples: int, label: int | None) -> None:
        """Decide which sub-batch a backward pass belongs to; p.grad is still without it.

        ``label`` is the sub-batch that the user says, None for no word.
        """
        if not any(self._passes):
            self._labelled, self.split, self._label = label is not None, label is None, label or 0
        elif self._labelled != (label is not None):
            self.drop("some of its backward passes were outside sub_batch()")
        elif label is not None:
            self._turn_to(label)
        else:
            if self.split and not self._splits_like_first(samples):
                self.split, self.sums = False, SplitSums()
            if not self.split:
                self._turn_to((self._label + 1) % self.count)

    def _splits_like_first(self, samples: int) -> bool:
        # One formula gives the gradients from the sums only if all passes were split in the same ratio.
        first = self._ratio_of
        pairs = zip(sub_batch_sizes(samples, self.count), sub_batch_sizes(first, self.count), strict=True)
        return bool(self.sums.first) and all(now * first == then * samples > 0 for now, then in pairs)

    def _turn_to(self, label: int) -> None:
        """Go over to a sub-batch: from here on p.grad grows by its gradients."""
        if label != self._label and not self._dropped:
            for param in self._params:
                if param.grad is None:
                    continue
                dtype = torch.promote_types(param.grad.dtype, torch.float32)
                # The last sub-batch is what the others leave of p.grad.
                for k, sign in ((self._label, 1), (label, -1)):
                    if k < len(self._earlier):
                        zeros = torch.zeros_like(param.grad, dtype=dtype)
                        self._earlier[k].setdefault(param, zeros).add_(param.grad, alpha=sign)
        self._label = label

    def add(self, record: PassRecord, continued: bool) -> None:
        """Add a finished backward pass; ``continued`` if it is one with the pass before it.

        One without samples adds nothing to any sub-batch.
        """
        if not record.samples:
            self._reason = self._reason or record.problem
            if record.problem == EMPTY:
                return
        self._precise &= record.precise
        if self.split and not self._dropped:
            if record.problem is None:
                if self._ratio_of:
                    self.sums.add(record.sums)
                else:
                    self._ratio_of, self.sums = record.samples, record.sums
            else:
                # Whole passes may still make up sub-batches.
                self.sums, self._reason = SplitSums(), record.problem
        if not continued:
            self._passes[self._label] += 1
            self._samples[self._label] += record.samples

    def drop(self, why: str) -> None:
        """Take the K-FAC step: the gradients of the sub-batches are not known."""
        self._dropped, self._reason, self.sums = True, why, SplitSums()
        self._earlier = [{} for _ in self._earlier]

    def compare(self, gradient: Tensor) -> None:
        """Find out from passes with statistics whether ``gradient``, the weight's, is all that the hooks saw.

        It is not where the loss has other paths to the weight: a penalty, a second use as a function.
        """
        if self.sums.whole is None or not self.sums.first:
            return
        sums = self.sums.whole, *self.sums.first
        whole, *first = (self._layer.from_matrix(each, self._params[0])[0] for each in sums)
        tolerance = _SAME_SUM if self._precise else _SAME_SUM_HALF
        squares = [each.square().sum() for each in (*first, reduce(torch.sub, first, whole))]
        difference = (whole - gradient.to(whole.dtype)).square().sum()
        self.complete = difference <= tolerance**2 * torch.stack(squares).sum()

    def gradients(
        self,
        average: Tensor,
        complete: Tensor | None,
        reduction: Reduction,
        scaling: Scaling | None,
    ) -> SubBatchGradients:
        """Return Ga and the differences of the sub-batches; without these where they are not known.

        If p.grad was scaled as a whole since the backward pass (unscaling, norm clipping), the sub-batch
        gradients follow; after any other change the differences are 0, which makes the step K-FAC's.
        ``average`` is Ga, ``complete`` what `compare` found at the last statistics.
        """
        counts = self._passes if reduction == "mean" else self._samples
        if scaling is None or self._dropped or not (all(counts) or self.sums.first):
            return SubBatchGradients(average, reason=self._why_unknown())
        scale, trusted = scaling.scale.to(average.dtype), scaling.alone
        vetoes = [self.clean]
        if self.sums.first:
            N = self._ratio_of
            shares = [size / N for size in sub_batch_sizes(N, self.count)[:-1]]
            sums = [each.to(average.dtype) for each in self.sums.first]
            vetoes.append(complete)
        else:
            shares = [count / sum(counts) for count in counts[:-1]]
            sums, scale = (
                [self._earlier_matrix(k) * scale for k in range(self.count - 1)],
                torch.ones_like(scale),
            )
            if self._label < len(sums):
                sums[self._label] = sums[self._label] + average
        for veto in vetoes:
            if veto is not None:
                trusted = trusted & veto
        differences = contrasts(sums, [*shares, 1 - sum(shares)], average, scale)
        # Not a product: 0 times NaN is NaN.
        believed = tuple(torch.where(trusted, each, 0) for each in differences)
        return SubBatchGradients(average, believed, trusted, _CHANGED)

    def _why_unknown(self) -> str:
        if self._reason is None and not any(self._passes):
            return "p.grad was not made by a backward pass through the layer"
        if self._reason is None and sum(map(bool, self._passes)) > 1:
            return "it had no backward pass of some sub-batches"
        return self._reason or "its backward passes were all of one sub-batch"

    def _earlier_matrix(self, k: int) -> Tensor:
        weight, *bias = (self._earlier[k].get(param) for param in self._params)
        assert weight is not None
        return self._layer.to_matrix(weight, bias[0] if bias else None)

    def measure(self, param: Tensor, gradient: Tensor, *, again: bool = False) -> list[Tensor]:
        """Return numbers of a gradient that together tell a scaling from any other change, 0-dim.

        The 2-norm, the 1-norm (clipped elements), the sum (added ones), and the product with the gradient of
        the first sub-batch (signs and order), 0 for a bias in split passes; ``again`` the norm of that, too.
        """
        flat = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        first: Tensor | None = None
        if self.sums.first:
            if param is self._params[0]:
                first, _ = self._layer.from_matrix(self.sums.first[0], param)
        elif self._earlier:
            first = self._earlier[0].get(param)
        measured = [torch.linalg.vector_norm(flat), torch.linalg.vector_norm(flat, 1), flat.sum()]
        if first is None:
            return measured + [torch.zeros_like(measured[0])] * (1 + again)
        first = first.reshape(-1).to(flat.dtype)
        measured.append(flat.reshape(-1) @ first)
        return [*measured, torch.linalg.vector_norm(first)] if again else measured


def scalings(all_sub_batches: Iterable[SubBatches]) -> dict[SubBatches, Scaling]:
    """Return what became of each p.grad since the backward pass, where one was measured.

    All are on one device and of one dtype.
    """
    rows: dict[SubBatches, list[list[Tensor]]] = {}
    for each in all_sub_batches:
        known = [(p, p.grad, was) for p, was in each.measures.items() if p.grad is not None]
        if known and (each.sums.first or any(each._earlier)):
            rows[each] = [[*was, *each.measure(p, gradient, again=True)] for p, gradient, was in known]
    if not rows:
        return {}
    # Of a weight and of its bias; zeros for none.
    width, zero = max(map(len, rows.values())), torch.zeros_like(next(iter(rows.values()))[0][0])
    filled = [(*of_one, *[[zero] * 9] * (width - len(of_one))) for of_one in rows.values()]
    numbers = torch.stack([x for of_one in filled for row in of_one for x in row]).view(len(rows), width, 9)
    was, now, length = numbers.split([4, 4, 1], dim=-1)
    for each_time in (was, now):
        # The component along the first sub-batch.
        each_time[..., 3:] /= length.clamp(min=torch.finfo(length.dtype).tiny)
    # One scale for weight and bias, from the Euclidean norm of both.
    norms = torch.linalg.vector_norm(torch.stack([was[..., 0], now[..., 0]]), dim=-1)
    scale = torch.nan_to_num(norms[1] / norms[0], nan=0.0, posinf=0.0)
    # Each number is compared on the scale of what it can differ by.
    two, one = now[..., :1], now[..., 1:2]
    differs_by = (now - scale[:, None, None] * was).abs()
    alone = differs_by <= _SAME_DIRECTION * torch.cat([two, one, two, two], dim=-1)
    found = map(Scaling, scale.unbind(), alone.flatten(1).all(1).unbind())
    return dict(zip(rows, found, strict=True))
