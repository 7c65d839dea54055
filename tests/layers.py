"""What the suites of the layers share: seeded tensors and layers, plain formulas, and how close is the same."""

import math

import torch


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(layer_class, *args, seed=1, **kwargs):
    torch.manual_seed(seed)
    return layer_class(*args, **kwargs).double().eval()


def heads_of(x, heads):
    return torch.stack(x.chunk(heads, dim=-1), dim=1)


def plain_attention(query, key, value, mask=None):
    """softmax over the keys of (B, H, N, D), 0 for rows without any; key/value heads already repeated."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ value


def assert_same(actual, expected):
    """Equal but for the order of sums: here these have fewer than 256 terms, and the terms are about 1 or less."""
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=0, atol=256 * eps)
