"""What averages the gradients of a model over the ranks, and what wraps the model for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fop.capture import Hook, is_sharded, remove_all
from fop.distributed.buckets import Channel, explained
from fop.torch_internals import fsdp_group, is_ddp, running_ddp, unwrapped, wrappers


class Wrappers:
    """DistributedDataParallel, with which ``on_ddp`` is called, `fully_shard`, or neither, as far as seen."""

    def __init__(self, on_ddp: Callable[[Any], None]) -> None:
        self._on_ddp = on_ddp
        self._ddp: Callable[[], Any] = lambda: None
        self._sharded: Callable[[], Any] = lambda: None
        # Whether the last forward pass was one that is averaged; None where no hook of ours saw it.
        self._averages_pass: bool | None = None
        self._handles: list[RemovableHandle] = []
        self._watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        weakref.finalize(self, remove_all, self._handles)

    def see(self, root: nn.Module) -> None:
        """Look for wrappers around a model, now and when it runs (it may be wrapped later)."""
        for module in wrappers(root):
            if is_ddp(module):
                self.note(module)
        root = unwrapped(root)
        if root not in self._watched:
            self._watched.add(root)
            self._handles.append(root.register_forward_pre_hook(Hook(self, Wrappers.running)))
        for module in root.modules():
            # The outermost may have left all parameters to its children.
            if fsdp_group(module) is not None:
                self._sharded = weakref.ref(module)
                break

    def note(self, ddp: nn.Module) -> None:
        """Take this DistributedDataParallel for the one that averages the gradients."""
        if self._ddp() is not ddp:
            self._ddp = weakref.ref(ddp)
            self._on_ddp(ddp)

    @property
    def ddp(self) -> Any:
        """The DistributedDataParallel, None if none was seen."""
        return self._ddp()

    def averages(self, param: Tensor) -> bool:
        """Return whether p.grad is averaged over the ranks in the backward pass."""
        return self.ddp is not None or is_sharded(param)

    def synchronises(self, param: Tensor) -> bool:
        """Return whether it is in the running backward pass, and not only accumulated (``no_sync``)."""
        if not is_sharded(param):
            ddp = self.ddp
            if ddp is None:
                return False
            # As of the forward pass: the attribute is for the next one, or for an evaluation in between.
            of_pass = self._averages_pass
            return bool(ddp.require_backward_grad_sync) if of_pass is None else of_pass
        sharded = self._sharded()
        group = None if sharded is None else fsdp_group(sharded)
        return group is None or bool(group.reduce_grads)

    def running(self, module: nn.Module, *_: Any) -> None:
        """Look for a DistributedDataParallel in whose forward pass the model runs."""
        ddp = None if torch.compiler.is_compiling() else running_ddp()
        if ddp is not None and ddp.module is module:
            self.note(ddp)
            if torch.is_grad_enabled():
                self._averages_pass = bool(ddp.require_backward_grad_sync)


def average(channel: Channel, params: Sequence[Tensor]) -> None:
    """Replace p.grad by its mean over the ranks, None by zeros where another rank has a gradient."""
    used = torch.tensor([float(param.grad is not None) for param in params]).to(params[0].device)
    channel.all_reduce(used, "control").wait()
    wanted = [param for param, count in zip(params, used.tolist(), strict=True) if count]
    for flat, gradients in _flattened(wanted):
        channel.all_reduce(flat, "gradients").wait()
        flat /= channel.size
        for gradient, part in _parts(flat, gradients.values()):
            gradient.copy_(part)
        for param, gradient in gradients.items():
            param.grad = gradient


def share_gradients(channel: Channel, params: Sequence[Tensor], has_batch: bool) -> None:
    """Give ranks without a batch the mean gradients of those that have one; waits for the device."""
    device = params[0].device
    batches = torch.zeros(channel.size, device=device)
    batches[channel.rank] = float(has_batch)
    channel.all_reduce(batches, "control").wait()
    has = batches.tolist()
    if all(has):
        return
    source = has.index(1.0)
    used = torch.tensor([float(param.grad is not None) for param in params]).to(device)
    channel.broadcast(used, source, "control").wait()
    wanted = [param for param, count in zip(params, used.tolist(), strict=True) if count]
    for flat, gradients in _flattened(wanted):
        channel.broadcast(flat, source, "gradients").wait()
        if not has_batch:
            for param, part in _parts(flat, gradients):
                param.grad = part


def _flattened(params: Sequence[Tensor]) -> Iterator[tuple[Tensor, dict[Tensor, Tensor]]]:
    """Yield for each dtype the gradients as one tensor, and each by its parameter; zeros for None."""
    alike: dict[torch.dtype, list[Tensor]] = {}
    for param in params:
        alike.setdefault(param.dtype, []).append(param)
    for members in alike.values():
        gradients = {p: torch.zeros_like(p) if p.grad is None else p.grad for p in members}
        yield torch.cat([gradient.reshape(-1) for gradient in gradients.values()]), gradients


def _parts(flat: Tensor, tensors: Collection[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each tensor and its part of what they were flattened to, in its shape."""
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        yield tensor, part.view_as(tensor)


def check_group(group: dist.ProcessGroup | None, ddp: Any) -> None:
    """Raise ValueError if DistributedDataParallel averages over other ranks than those of ``group``."""
    if group is None:
        return
    ours, theirs = (sorted(dist.get_process_group_ranks(each)) for each in (group, ddp.process_group))
    if ours != theirs:
        raise ValueError(
            f"distributed: 'group' has the ranks {ours}, and DistributedDataParallel averages over {theirs}; "
            "give both the same process group"
        )


# Which gradients the communication hook of a DistributedDataParallel leaves out, in a list of one.
_asked: weakref.WeakKeyDictionary[nn.Module, list[Callable[[Tensor], bool]]] = weakref.WeakKeyDictionary()


def average_lean(ddp: Any, is_lean: Callable[[Tensor], bool]) -> None:
    """Let DistributedDataParallel leave out the gradients that go to owners; ValueError if it has a hook."""
    if (asked := _asked.get(ddp)) is not None:
        # A hook cannot be taken away: that of an optimizer before this one serves it, too.
        asked[:] = [is_lean]
        return
    asked = [is_lean]
    try:
        ddp.register_comm_hook(None, _lean_hook(lambda param: asked[0](param), ddp.process_group))
        _asked[ddp] = asked
    except RuntimeError as error:
        raise ValueError(
            "distributed: mode='lean' needs a communication hook of its own, and this "
            "DistributedDataParallel has one already; make it without, or use mode='compatible'"
        ) from error


def _lean_hook(is_lean: Callable[[Tensor], bool], group: dist.ProcessGroup) -> Callable[[object, Any], Any]:
    """Return a communication hook of DistributedDataParallel that leaves out the gradients sent to owners."""
    ranks = dist.get_world_size(group)

    def hook(state: object, bucket: Any) -> Any:
        buffer: Tensor = bucket.buffer()
        gradients = bucket.gradients()
        wanted = [g for g, p in zip(gradients, bucket.parameters(), strict=True) if not is_lean(p)]
        if not wanted:
            done: Any = torch.futures.Future()
            done.set_result(buffer)
            return done
        flat = buffer if len(wanted) == len(gradients) else torch.cat([g.reshape(-1) for g in wanted])
        flat.div_(ranks)
        with explained("gradients (all_reduce)", group):
            work = dist.all_reduce(flat, group=group, async_op=True)
        assert work is not None

        def put_back(future: Any) -> Tensor:
            with explained("gradients (all_reduce)", group):
                future.wait()
            if flat is not buffer:
                for gradient, part in _parts(flat, wanted):
                    gradient.copy_(part)
            return buffer

        return work.get_future().then(put_back)

    # torch looks at the types themselves, not at their names.
    bucket_type = dist.GradBucket  # type: ignore[attr-defined]
    hook.__annotations__ = {"bucket": bucket_type, "return": torch.futures.Future[torch.Tensor]}
    return hook
