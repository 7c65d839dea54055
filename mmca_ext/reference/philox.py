"""Counter-based dropout: the mask is a pure function of (seed, offset, batch, head, position, key).

Philox 4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85
_LANES = 8  # 16-bit lanes in the four 32-bit words of one counter
_LANE_VALUES = 1 << 16


def _multiply(a, b):
    """(high, low) 32-bit words of a * b. int64 wraps modulo 2**64, which keeps all 64 bits of the product."""
    product = a * b
    return (product >> 32) & _WORD, product & _WORD


def philox_4x32_10(counter, key):
    """Ten rounds on four counter words and two key words: int64 tensors holding 32-bit values, broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _WORD, (k1 + _KEY_INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3


def dropout_threshold(p):
    """T = round(65536 p): a weight is kept iff its lane is >= T."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], got {p}")
    return round(_LANE_VALUES * p)


def keep_mask(batches, heads, positions, k_len, p, rng_state):
    """Boolean (B, H, Lq, Lk), True where the weight survives.

    batches (B,) and positions (Lq,) are the b and p_i of the counter (j // 8, p_i, b * H + h, offset).
    """
    device = positions.device
    seed, offset = rng_state.to(device).unbind()
    chunk = torch.arange((k_len + _LANES - 1) // _LANES, device=device)
    row = positions.view(-1, 1) & _WORD  # a row before the first key has a negative position: two's complement
    head = torch.arange(heads, device=device)
    stream = ((batches.view(-1, 1) * heads + head) & _WORD)[:, :, None, None]
    words = philox_4x32_10((chunk, row, stream, offset & _WORD), (seed & _WORD, (seed >> 32) & _WORD))
    words = torch.stack(torch.broadcast_tensors(*words), dim=-1)
    lanes = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(-3)  # lane l: half l % 2 of word l // 2
    return lanes[..., :k_len] >= dropout_threshold(p)


def dropout_factor(batches, heads, positions, k_len, p, rng_state, dtype):
    """Z: 0 where dropped, 65536 / (65536 - T) where kept."""
    kept_values = _LANE_VALUES - dropout_threshold(p)
    scale = _LANE_VALUES / kept_values if kept_values else 0.0
    return keep_mask(batches, heads, positions, k_len, p, rng_state).to(dtype) * scale


def dropout_mask(batch, heads, q_len, k_len, p, seed, offset):
    """The dropout mask that every kernel uses for this seed and offset.

    Args:
        batch, heads, q_len, k_len: its shape; heads are query heads. For sequence n of a packed call take batch n of a
            mask with that sequence's lengths.
        p: probability of dropping a weight, rounded to a multiple of 1 / 65536.
        seed, offset: the two numbers of the call's `rng_state`; the offset counts modulo 2**32.

    Returns:
        Boolean (batch, heads, q_len, k_len) on the CPU, True where the weight is kept (and multiplied by
        65536 / (65536 - round(65536 p))).

    Raises:
        ValueError: p outside [0, 1].
    """
    rng_state = torch.tensor([int(seed), int(offset)], dtype=torch.int64)
    positions = torch.arange(q_len) + (k_len - q_len)
    return keep_mask(torch.arange(batch), heads, positions, k_len, p, rng_state)


def _draw_rng_state(generator):
    """A fresh (seed, offset) pair, int64 (2,), on the CPU: kernels take it by value, also those of a GPU, which need
    not be waited for then. The same seed gives the same mask on every device."""
    device = "cpu" if generator is None else generator.device
    return torch.randint(0, 2**62, (2,), generator=generator, device=device).cpu()
