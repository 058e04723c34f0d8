"""What a rank of `tests/bench/test_scale.py` does; apart, so that its process imports little."""

import time

import torch
import torch.distributed as dist


def fail_on_rank_1(patience: float) -> None:
    assert torch.get_num_threads() == 1
    if dist.get_rank() == 1:
        raise ValueError("no such luck")
    time.sleep(patience)
