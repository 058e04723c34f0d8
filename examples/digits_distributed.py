"""Train a small CNN on scikit-learn's digits on several ranks, which may be killed and started again.

    torchrun --nproc-per-node 2 examples/digits_distributed.py --epochs 5 --checkpoint DIR

It goes on from the newest checkpoint in DIR, on any number of ranks; on several machines DIR must be on a
file system that they share. Plain `python` trains on one process. GPUs are used if there are any. Needs
scikit-learn.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from fop import FOP


def main() -> None:
    """Read the command line, and train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5, help="of the whole run, however often resumed")
    parser.add_argument("--batch-size", type=int, default=96, help="samples per step, of all ranks together")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder to save to and resume from")
    args = parser.parse_args()

    device = join_ranks()
    if args.batch_size < 1 or args.batch_size % dist.get_world_size():
        parser.error(f"--batch-size {args.batch_size} is no multiple of the {dist.get_world_size()} ranks")
    train(device, args.epochs, args.batch_size, args.lr, args.checkpoint)
    # With gloo a process can hang at its end if DistributedDataParallel outlives the process group. `train`
    # has let go of it, but get_state_dict has left it in reference cycles.
    gc.collect()
    dist.destroy_process_group()


def train(device: torch.device, epochs: int, batch_size: int, lr: float, folder: Path) -> None:
    """Train from the newest checkpoint on, or from the start, and save after every epoch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    train_set, test_set = digits()
    # Deals samples out one by one: the ranks' batches together are the same for every number of ranks.
    sampler: DistributedSampler[Any] = DistributedSampler(train_set, ranks, rank, seed=0, drop_last=True)
    batches = DataLoader(train_set, batch_size // ranks, sampler=sampler, drop_last=True)

    torch.manual_seed(0)
    model = DistributedDataParallel(cnn().to(device))
    # From the module, not its parameters: a checkpoint is loaded before the first forward pass.
    optimizer = FOP(model, lr=lr)
    scheduler = LambdaLR(optimizer, lambda epoch: 0.5 + 0.5 * math.cos(math.pi * epoch / epochs))
    done = load(folder, model, optimizer, scheduler)
    if rank == 0:
        print(f"ranks: {ranks}, epochs done: {done} of {epochs}", flush=True)

    for epoch in range(done + 1, epochs + 1):
        sampler.set_epoch(epoch)
        model.train()
        for images, labels in batches:
            optimizer.zero_grad()
            cross_entropy(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
        scheduler.step()
        save(folder, epoch, model, optimizer, scheduler)
        if rank == 0:
            print(f"epoch {epoch}: test accuracy {accuracy(model.module, test_set, device):.1%}", flush=True)


def join_ranks() -> torch.device:
    """Join the other ranks that torchrun has started, and return the device of this one."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if gpu else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return 1437 images to train on and 360 to test on, (1, 8, 8) from 0 to 1, with their labels."""
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target)
    train, test = train_test_split(range(len(labels)), test_size=360, stratify=data.target, random_state=0)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def cnn() -> nn.Module:
    """Return a network from images (N, 1, 8, 8) to logits (N, 10)."""
    # GroupNorm, because BatchNorm's running averages would be of rank 0's samples alone.
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


@torch.no_grad()
def accuracy(model: nn.Module, samples: Dataset[Any], device: torch.device) -> float:
    """Return the share of samples that the model gets right."""
    model.eval()
    right = total = 0
    for images, labels in DataLoader(samples, 512):
        right += int((model(images.to(device)).argmax(1) == labels.to(device)).sum())
        total += len(labels)
    return right / total


def state_of(model: nn.Module, optimizer: FOP, scheduler: LambdaLR, epoch: int) -> dict[str, Any]:
    """Return what a checkpoint holds: of the curvature, each rank has that of its own layers."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    schedule = scheduler.state_dict()
    return {"model": model_state, "optimizer": optimizer_state, "scheduler": schedule, "epoch": epoch}


def save(folder: Path, epoch: int, model: nn.Module, optimizer: FOP, scheduler: LambdaLR) -> None:
    """Save after an epoch; called by all ranks."""
    name = f"epoch-{epoch}"
    dcp.save(state_of(model, optimizer, scheduler, epoch), checkpoint_id=folder / name)
    # All ranks have written. `latest` is replaced in one go: it always names a checkpoint that is complete.
    if dist.get_rank() == 0:
        (folder / "latest.new").write_text(name)
        (folder / "latest.new").replace(folder / "latest")


def load(folder: Path, model: nn.Module, optimizer: FOP, scheduler: LambdaLR) -> int:
    """Load the newest checkpoint, if there is one, and return how many epochs it has seen."""
    if not (folder / "latest").exists():
        return 0
    # torch reads in place: into the fresh state of this run, which knows what is this rank's share now.
    state = state_of(model, optimizer, scheduler, epoch=0)
    dcp.load(state, checkpoint_id=folder / (folder / "latest").read_text())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    epoch: int = state["epoch"]
    return epoch


if __name__ == "__main__":
    main()
