"""Keys and values of the tokens seen so far, so that generating a token costs one token's projections."""

import torch

from ._heads import check_sizes


class KVCache:
    """Preallocated keys and values of one attention layer, with each token's modality and image.

        cache = KVCache.for_layer(layer, batch=1, capacity=1024)
        with torch.no_grad():
            out = layer(prompt, cache=cache)            # all rows of the prompt
            out = layer(next_token, cache=cache)        # one row, which attends to the prompt and to itself

    The memory is allocated once, (B, kv_heads, capacity, dim_head): the rows of a head lie side by side, as decoding
    reads them. It is for inference: no gradient flows through it. Every layer of a model has a cache of its own.

    Args:
        batch: sequences.
        capacity: the most tokens a sequence may have, padding included.
        kv_heads: key/value heads.
        dim_head: features per key head.
        value_dim: features per value head; None: dim_head.
        dtype: of the keys and values.
        device: of all memory.

    Attributes:
        length: tokens per sequence so far.
        frozen: True for an encoded context (`layer.cache_context`): layers attend to it and append nothing.
        explicit_positions: a layer with rotary was told the positions of these tokens, and must be told the next ones.

    Raises:
        ValueError, TypeError: at construction and in every method, naming the argument and what is accepted; what they
            refuse leaves the cache as it was.
    """

    def __init__(self, batch, capacity, kv_heads, dim_head, value_dim=None, dtype=torch.float32, device="cpu"):
        for name, size in (("batch", batch), ("capacity", capacity)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise ValueError(f"{name} must be an integer of 0 or more, got {size!r}")
        value_dim = dim_head if value_dim is None else value_dim
        check_sizes(kv_heads=kv_heads, dim_head=dim_head, value_dim=value_dim)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point type, got {dtype}")
        self._keys = torch.empty(batch, kv_heads, capacity, dim_head, dtype=dtype, device=device)
        self._values = torch.empty(batch, kv_heads, capacity, value_dim, dtype=dtype, device=device)
        self._modality = torch.empty(batch, capacity, dtype=torch.int32, device=device)
        self._image_id = torch.empty(batch, capacity, dtype=torch.int64, device=device)
        self.frozen = False
        self.reset()

    @classmethod
    def for_layer(cls, layer, batch, capacity, dtype=None):
        """An empty cache that fits an MGQA or a MultiModalCausalAttention.

        dtype is that of the layer's weights; under autocast name the one that its projections give.
        """
        if not hasattr(layer, "kv_heads"):
            raise TypeError(f"layer must be an MGQA or a MultiModalCausalAttention, got {type(layer).__name__}")
        if getattr(layer, "linear", False):
            raise TypeError("layer is linear: LinearCache.for_layer makes its cache")
        weight = layer.to_out.weight
        dtype = weight.dtype if dtype is None else dtype
        return cls(batch, capacity, layer.kv_heads, layer.dim_head, dtype=dtype, device=weight.device)

    @classmethod
    def of_context(cls, key, value, mask=None):
        """A frozen cache of a context: key (B, H, M, D), value (B, H, M, Dv), boolean mask (B, M), True = attend."""
        batch, heads, length, dim_head = key.shape
        cache = cls(batch, length, heads, dim_head, value.shape[3], key.dtype, key.device)
        cache.append(key, value, None if mask is None else mask.int())
        cache.frozen = True
        return cache

    @property
    def batch(self):
        return self._keys.shape[0]

    @property
    def capacity(self):
        return self._keys.shape[2]

    @property
    def keys(self):
        """(B, kv_heads, length, dim_head), a view."""
        return self._keys[:, :, : self.length]

    @property
    def values(self):
        """(B, kv_heads, length, value_dim), a view."""
        return self._values[:, :, : self.length]

    @property
    def modality(self):
        """int32 (B, length), a view: 0 padding, 1 text, 2 and above image."""
        return self._modality[:, : self.length]

    @property
    def image_id(self):
        """int64 (B, length), a view."""
        return self._image_id[:, : self.length]

    @property
    def key_mask(self):
        """Boolean (B, length), False for padding; None as long as no token was given a modality."""
        return self.modality != 0 if self._has_modality else None

    def append(self, key, value, modality=None, image_id=None):
        """Copy n more tokens per sequence into the cache.

        Args:
            key: (B, kv_heads, n, dim_head), any strides.
            value: (B, kv_heads, n, value_dim).
            modality: integers (B, n), or one for all: 0 padding, 1 text, 2 and above image; None: text.
            image_id: integers (B, n), or one for all: tells neighbouring images apart; None: the modality.
        """
        self._refuse_if_frozen()
        self._check_heads("key", key, self._keys)
        self._check_heads("value", value, self._values)
        count = key.shape[2]
        if value.shape[2] != count:
            raise ValueError(f"key and value differ in tokens: {count} and {value.shape[2]}")
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise ValueError(
                "key or value requires a gradient, and the cache keeps none: call the layer under torch.no_grad()"
            )
        for name, ids in (("modality", modality), ("image_id", image_id)):
            self._check_ids(name, ids, count)
        end = self.length + count
        if end > self.capacity:
            raise ValueError(f"the cache has {self.length} of capacity={self.capacity} tokens, {count} more do not fit")

        new = slice(self.length, end)
        self._keys[:, :, new] = key
        self._values[:, :, new] = value
        self._modality[:, new] = 1 if modality is None else modality
        self._image_id[:, new] = self._modality[:, new] if image_id is None else image_id
        self._has_modality = self._has_modality or modality is not None
        self.length = end

    def truncate(self, length):
        """Forget the tokens from `length` on: those that speculative decoding proposed in vain."""
        self._refuse_if_frozen()
        if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= self.length:
            raise ValueError(f"length must be an integer from 0 to {self.length}, got {length!r}")
        self.length = length

    def reset(self):
        """Forget all tokens; the memory stays."""
        self._refuse_if_frozen()
        self.length = 0
        self._has_modality = False
        self.explicit_positions = False

    def reorder(self, index):
        """Sequence b becomes what sequence index[b] was: the beams that beam search goes on with.

        Args:
            index: integers (B,).
        """
        if not isinstance(index, torch.Tensor) or index.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"index must be an int32 or int64 tensor, got {getattr(index, 'dtype', type(index).__name__)}"
            )
        if tuple(index.shape) != (self.batch,):
            raise ValueError(f"index must have shape ({self.batch},), got {tuple(index.shape)}")
        if index.device.type == "cpu" and bool(((index < 0) | (index >= self.batch)).any()):
            raise ValueError(f"index must hold integers from 0 to {self.batch - 1}, got {index.tolist()}")
        for filled in (self.keys, self.values, self.modality, self.image_id):
            filled.copy_(filled.index_select(0, index))

    def _refuse_if_frozen(self):
        if self.frozen:
            raise ValueError("this cache is frozen: it holds an encoded context, which stays as it is")

    def _check_heads(self, name, heads, store):
        if not isinstance(heads, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(heads).__name__}")
        batch, kv_heads, _, width = store.shape
        if heads.dim() != 4 or (heads.shape[0], heads.shape[1], heads.shape[3]) != (batch, kv_heads, width):
            raise ValueError(f"{name} must have shape ({batch}, {kv_heads}, n, {width}), got {tuple(heads.shape)}")
        if heads.dtype != store.dtype:
            raise TypeError(f"{name} must have the cache's dtype {store.dtype}, got {heads.dtype}")
        if heads.device != store.device:
            raise ValueError(f"{name} must be on the cache's device {store.device}, got {heads.device}")

    def _check_ids(self, name, ids, count):
        if ids is None or (isinstance(ids, int) and not isinstance(ids, bool)):
            negative = ids is not None and ids < 0
        elif (
            not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool
        ):
            raise TypeError(f"{name} must hold integers, got {getattr(ids, 'dtype', type(ids).__name__)}")
        elif tuple(ids.shape) != (self.batch, count):
            raise ValueError(f"{name} must have shape ({self.batch}, {count}), got {tuple(ids.shape)}")
        else:  # values are looked at where that is free
            negative = ids.device.type == "cpu" and not torch.compiler.is_compiling() and bool((ids < 0).any())
        if name == "modality" and negative:
            raise ValueError(
                f"modality must be 0 (padding), 1 (text) or more (image), got {int(torch.as_tensor(ids).min())}"
            )

    def __repr__(self):
        batch, kv_heads, capacity, dim_head = self._keys.shape
        return (
            f"KVCache(length={self.length}, capacity={capacity}, batch={batch}, kv_heads={kv_heads}, "
            f"dim_head={dim_head}, dtype={self._keys.dtype}, device={self._keys.device!r}, frozen={self.frozen})"
        )


def check_cache(cache, batch, kv_heads, dim_head):
    """The cache a layer was given: one of ours, for its heads and this batch."""
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a KVCache, got {type(cache).__name__}")
    has, needs = (cache.batch, cache.keys.shape[1], cache.keys.shape[3]), (batch, kv_heads, dim_head)
    if has != needs:
        raise ValueError(f"cache is for (batch, kv_heads, dim_head) = {has}, and this call needs {needs}")
