"""Linear attention in the layers: the state that takes the KV cache's place, and images that attend to themselves."""

import torch
import torch.nn.functional as F

from .. import functional, reference
from ..reference import LinearState
from ._heads import check_sizes

NO_FORM = "linear attention, which never forms the scores of pairs, has no form of it"


class LinearCache:
    """What linear attention remembers of the tokens so far: a state of constant size for each key group.

        cache = LinearCache.for_layer(layer, batch=1)
        with torch.no_grad():
            out = layer(prompt, cache=cache)            # all rows of the prompt
            out = layer(next_token, cache=cache)        # one row, in constant time and memory

    It takes the place of a KVCache in layers made with linear=True, and needs no capacity. What it has seen it cannot
    forget again: there is no `truncate`; `copy` keeps a point to come back to. It is for inference: no gradient flows
    through it. Every layer of a model has a cache of its own.

    Args:
        batch: sequences.
        kv_heads: key/value heads.
        dim_head: features per head.
        groups: key groups: 1 in MGQA, 2 (text, image) in MultiModalCausalAttention.
        device: of the states.

    Attributes:
        states: a LinearState for each group, float64: `functional.LinearState`.
        length: tokens per sequence so far.
        frozen: True for an encoded context (`layer.cache_context`): layers attend to it and add nothing.

    Raises:
        ValueError, TypeError: at construction and in every method, naming the argument and what is accepted.
    """

    def __init__(self, batch, kv_heads, dim_head, groups=1, device="cpu"):
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 0:
            raise ValueError(f"batch must be an integer of 0 or more, got {batch!r}")
        check_sizes(kv_heads=kv_heads, dim_head=dim_head, groups=groups)
        self._shape, self._groups, self._device = (batch, kv_heads, dim_head), groups, device
        self.frozen = False
        self.reset()

    @classmethod
    def for_layer(cls, layer, batch):
        """An empty cache that fits an MGQA or a MultiModalCausalAttention made with linear=True."""
        if not getattr(layer, "linear", False):
            raise TypeError(f"layer must be made with linear=True, got {layer}; others have a KVCache")
        groups = 1 if hasattr(layer, "to_q") else 2
        return cls(batch, layer.kv_heads, layer.dim_head, groups, layer.to_out.weight.device)

    @classmethod
    def of_context(cls, state, length):
        """A frozen cache of a context, from its state."""
        batch, heads, dim_head, _ = state.S.shape
        cache = cls(batch, heads, dim_head, device=state.S.device)
        cache.states, cache.length, cache.frozen = (state,), length, True
        return cache

    @property
    def batch(self):
        return self._shape[0]

    def reset(self):
        """Forget all tokens."""
        self._refuse_if_frozen()
        batch, heads, dim = self._shape
        S = torch.zeros(batch, heads, dim, dim, dtype=torch.float64, device=self._device)
        self.states = tuple(LinearState(S, S.new_zeros(batch, heads, dim)) for _ in range(self._groups))
        self.length = 0
        self.last_ids = None  # modality and image of each sequence's last token

    def copy(self):
        """A cache that goes on from here on its own; states are not changed in place, so this copies no memory."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def advance(self, states, count, last_ids=None):
        """The states after `count` more tokens."""
        self._refuse_if_frozen()
        if torch.is_grad_enabled() and any(t.requires_grad for state in states for t in state):
            raise ValueError(
                "key or value requires a gradient, and the cache keeps none: call the layer under torch.no_grad()"
            )
        self.states, self.length = tuple(states), self.length + count
        if count and last_ids is not None:
            self.last_ids = last_ids

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
        self.states = tuple(LinearState(*(t.index_select(0, index) for t in state)) for state in self.states)
        if self.last_ids is not None:
            self.last_ids = tuple(t.index_select(0, index) for t in self.last_ids)

    def _refuse_if_frozen(self):
        if self.frozen:
            raise ValueError("this cache is frozen: it holds an encoded context, which stays as it is")

    def __repr__(self):
        batch, kv_heads, dim_head = self._shape
        return (
            f"LinearCache(length={self.length}, batch={batch}, kv_heads={kv_heads}, dim_head={dim_head}, "
            f"groups={self._groups}, frozen={self.frozen})"
        )


def check_linear_cache(cache, batch, kv_heads, dim_head, groups=1):
    """The cache a linear layer was given: one of ours, for its heads, its groups and this batch."""
    if not isinstance(cache, LinearCache):
        raise TypeError(f"cache must be a LinearCache, as the layer is linear, got {type(cache).__name__}")
    has, needs = (*cache._shape, cache._groups), (batch, kv_heads, dim_head, groups)
    if has != needs:
        raise ValueError(f"cache is for (batch, kv_heads, dim_head, groups) = {has}, and this call needs {needs}")


def check_linear(linear, **options):
    """Options that speak of scores do not go with linear=True."""
    for name, given in options.items():
        if linear and given:
            raise ValueError(f"{name} does not go with linear=True: {NO_FORM}")


def check_modality(modality):
    """What the softmax operator checks by itself. Values are looked at where that is free."""
    if modality.is_floating_point() or modality.is_complex() or modality.dtype == torch.bool:
        raise TypeError(f"modality must be an integer tensor, got {modality.dtype}")
    if modality.device.type == "cpu" and not torch.compiler.is_compiling() and bool((modality < 0).any()):
        raise ValueError(f"modality must be 0 (padding), 1 (text) or >= 2 (image), got {int(modality.min())}")


def attend(layer, query, key, value, is_causal, keep=False, **kwargs):
    """functional.linear_attention, or the reference where flash is off; with `keep` (out, state). Dropout, which has no
    weights to act on, acts on the heads' output."""
    kwargs = {name: x for name, x in kwargs.items() if not name.startswith("max_seqlen")}
    module = functional if layer.flash else reference
    found = module.linear_attention(query, key, value, is_causal, return_state=keep, **kwargs)
    out, state = found if keep else (found, None)
    out = F.dropout(out, layer.dropout, layer.training)
    return (out, state) if keep else out


def images_to_themselves(layer, query, key, value, modality, image_id, cu_seqlens):
    """Each image token attends to all tokens of its own image: (B, Hq, N, D) or (T, Hq, D), 0 in other rows.

    Runs of neighbours of one kind become packed sequences, of which those that are no image have no key. There may be
    as many as tokens, so there are that many offsets, the last ones of empty sequences: shapes that no value changes.
    """
    packed = cu_seqlens is not None
    flat = [t if packed else t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]
    ids, image = (modality if image_id is None else image_id).flatten(), modality.flatten() >= 2
    place = torch.arange(len(image), device=image.device)
    if packed:
        image = image & (place < cu_seqlens[-1])
        sequence = torch.searchsorted(cu_seqlens, place, right=True)
    else:
        sequence = place // max(1, modality.shape[-1])
    kind = torch.stack((sequence, image, ids.masked_fill(~image, 0)))
    run = F.pad((kind[:, 1:] != kind[:, :-1]).any(0), (min(1, len(place)), 0)).cumsum(0)
    lengths = torch.zeros_like(place).index_add(0, run, torch.ones_like(place))
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    rows = attend(layer, *flat, False, key_mask=image, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    return rows if packed else rows.unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2)
