import numpy as np
import torch
from sklearn.datasets import load_digits

from fop_bench.digits import digits, split_indices


def test_parts_are_disjoint_and_together_complete():
    parts = split_indices()
    assert [len(part) for part in parts] == [1024, 386, 387]
    together = np.concatenate(parts)
    assert np.array_equal(np.sort(together), np.arange(len(load_digits().target)))


def test_split_is_fixed_and_stratified():
    labels = load_digits().target
    for part, again in zip(split_indices(), split_indices(), strict=True):
        assert np.array_equal(part, again)
        shares = np.bincount(labels[part], minlength=10) / len(part)
        assert np.abs(shares - np.bincount(labels) / len(labels)).max() < 0.005


def test_tensors_hold_the_images_of_their_indices():
    raw = load_digits()
    data = digits(torch.device("cpu"))
    for samples, part in zip((data.train, data.validation, data.test), split_indices(), strict=True):
        assert samples.inputs.shape == (len(part), 1, 8, 8)
        assert samples.inputs.dtype == torch.float32
        np.testing.assert_allclose(samples.inputs[:, 0].numpy() * 16, raw.images[part])
        assert samples.targets.tolist() == raw.target[part].tolist()
