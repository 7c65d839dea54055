"""Seeded random attention problems, and the check that holds the kernels to the reference in fp64 on them.

Case(seed) draws everything from its seed: operator, dtype, instruction set, shapes, memory layouts, packing, masks,
biases, dropout, modalities, gates, which gradients are asked for. check(case) raises AssertionError with the command
that repeats the failure:

    python tests/cases.py SEED [ISA] [--device DEVICE]

What must hold is the promise of the documentation: every result is inside an a-priori bound (bounds.py), element by
element, or its RMS error is at most twice that of the standard (materialised) implementation at the same precision.
"""

import argparse
import math
import random
import sys
from dataclasses import dataclass, field

import devices
import torch
from bounds import bounds

from mmca_ext import _C, functional, reference
from mmca_ext.reference.mmca import IMAGE_ROWS, MERGES, visible_groups
from mmca_ext.reference.weights import positions, visible_by_order

# The CPU's instruction sets; on other devices the cases take no turns.
ISAS = sorted({kernel["isa"] for kernel in _C.kernels() if kernel["available"] and kernel["device"] == "cpu"})
if devices.current != "cpu":
    ISAS = ["scalar"]
LAYOUTS = ("contiguous", "rows", "sliced", "expanded", "offset", "features", "fused", "permuted")
TILE_EDGES = [edge + shift for edge in (96, 192, 256, 384) for shift in (-1, 0, 1)]
PRIMES = [11, 13, 17, 19, 23, 29, 31, 37, 43, 53, 61, 67]
DTYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
GRADIENTS = {"query": "dq", "key": "dk", "value": "dv", "attn_mask": "db", "gate": "dg"}
HEAD_DIMS = [17, 24, 31, 32, 33, 40, 63, 64, 65, 80, 96, 127, 128, 129, 160, 200, 255, 256]


# ---------------------------------------------------------------- a case


@dataclass
class Case:
    """One problem. `kwargs` goes to functional and reference alike; query, key, value and grad_out are laid out."""

    seed: int
    isa: str | None = None
    device: str = field(default_factory=lambda: devices.current)
    kwargs: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        self.random = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        choose = self.random.choice
        self.isa = self.isa or ISAS[self.seed % len(ISAS)]
        self.op = choose(("attention", "mmca_attention"))
        self.dtype = choose(DTYPES)
        self.threads = choose((1, 1, 1, 1, 1, 1, 1, 2))
        self._draw_shape()
        self.magnitude = choose((1.0, 1.0, 1.0, 1e-3, 4.0, 20.0))
        self.packed = self.random.random() < 0.15
        if self.packed:
            self._draw_sequences()
        self.integers = self.random.random() < 0.1
        self._draw_options()
        self.poison = self.random.random() < 0.2
        self.wanted = self._draw_wanted()
        self.return_lse = self.random.random() < 0.5
        self.grads_arrive = choose(("both", "out", "lse")) if self.return_lse else "out"
        self.layouts = [choose(("contiguous", "rows", *LAYOUTS)) for _ in range(4)]
        self._draw_tensors()

    # Shapes: mostly small, each sort of edge often enough, and no case so large that the suite would notice it.

    def _draw_shape(self):
        rand, choose = self.random, self.random.choice
        sort = rand.random()
        if sort < 0.25:
            lengths = rand.randrange(0, 10), rand.randrange(0, 10)
        elif sort < 0.45:
            lengths = choose(PRIMES), choose(PRIMES)
        elif sort < 0.6:  # decoding
            lengths = rand.randrange(1, 9), choose([*PRIMES, *TILE_EDGES])
        elif sort < 0.75:
            lengths = (choose(TILE_EDGES),) * 2
        elif sort < 0.9:
            lengths = choose([1, *PRIMES, *TILE_EDGES]), choose([1, *PRIMES, *TILE_EDGES])
        else:
            length = rand.randrange(1, 70)
            lengths = length, length
        self.q_len, self.k_len = lengths
        if self.op == "mmca_attention":
            self.q_len, self.k_len = min(lengths), max(lengths)
        self.batch = choose((1, 1, 1, 2, 2, 3, 5, 0 if rand.random() < 0.1 else 1))
        self.kv_heads, self.share = choose((1, 1, 1, 2, 2, 3)), choose((1, 1, 1, 2, 3, 4, 7))
        self.head_dim = choose(HEAD_DIMS) if rand.random() < 0.25 else rand.randrange(1, 17)
        self.value_dim = self.head_dim if rand.random() < 0.7 else choose([*range(1, 17), *HEAD_DIMS])
        limit = choose((1e6,) * 14 + (3e6,) * 5 + (2e7,))
        limit *= devices.SIZES[self.device]
        while self._cost() > limit and (self.batch > 1 or self.kv_heads > 1 or self.share > 1):
            name = max(("batch", "kv_heads", "share"), key=lambda n: getattr(self, n))
            setattr(self, name, getattr(self, name) - 1)
        while self._cost() > limit and max(self.head_dim, self.value_dim) > 1:
            self.head_dim, self.value_dim = (self.head_dim + 1) // 2, (self.value_dim + 1) // 2
        self.heads = self.kv_heads * self.share

    def _draw_sequences(self):
        """The drawn lengths become tokens of all sequences together, cut at random places; a few may belong to none."""

        def offsets(tokens, cuts):
            cuts = sorted(cuts)
            return self._restride(torch.tensor([0, *cuts], dtype=self.random.choice((torch.int32, torch.int64))))

        if self.op == "mmca_attention":
            self.q_len = self.k_len
        count = self.random.choice((0, 1, 2, 3, 7))
        q_cuts = [self.random.randrange(self.q_len + 1) for _ in range(count)]
        k_cuts = [self.random.randrange(self.k_len + 1) for _ in range(count)]
        if count and self.random.random() < 0.6:
            q_cuts[-1], k_cuts[-1] = self.q_len, self.k_len
        self.batch, limits = 1, {}
        q_offsets = offsets(self.q_len, q_cuts)
        if self.op == "mmca_attention":
            self.kwargs["cu_seqlens"], limits["max_seqlen"] = q_offsets, q_offsets
        else:
            k_offsets = offsets(self.k_len, k_cuts)
            self.kwargs["cu_seqlens_q"], self.kwargs["cu_seqlens_k"] = q_offsets, k_offsets
            limits["max_seqlen_q"], limits["max_seqlen_k"] = q_offsets, k_offsets
        for name, cu_seqlens in limits.items():
            if self.random.random() < 0.5:
                longest = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
                self.kwargs[name] = longest + self.random.choice((0, 5))

    def sequences(self):
        """(begin, end) of the queries and of the keys of each packed sequence."""
        q = self.kwargs["cu_seqlens" if self.op == "mmca_attention" else "cu_seqlens_q"].tolist()
        k = self.kwargs["cu_seqlens" if self.op == "mmca_attention" else "cu_seqlens_k"].tolist()
        return [((q[n], q[n + 1]), (k[n], k[n + 1])) for n in range(len(q) - 1)]

    def _draw_wanted(self):
        names = ["query", "key", "value"]
        for name in ("attn_mask", "gate"):
            if name in self.kwargs and self.kwargs[name].is_floating_point() and self.random.random() < 0.8:
                names.append(name)
        if self.random.random() < 0.4:
            names = [name for name in names if self.random.random() < 0.5] or ["query"]
        return tuple(names)

    def _cost(self):
        pairs = self.batch * self.kv_heads * self.share * self.q_len * self.k_len
        return pairs * (self.head_dim + self.value_dim + 8)

    def _draw_options(self):
        rand, choose, kwargs = self.random, self.random.choice, self.kwargs
        if rand.random() < 0.4:
            kwargs["scale"] = choose((1.0, 0.125, -0.7, 0.0, self.head_dim**-1.0))
        if rand.random() < 0.25:
            kwargs["dropout_p"] = choose((0.1, 0.1, 0.5, 0.9, 1.0, 1e-5, 1e-6, 0.9999))
        if rand.random() < 0.05:
            kwargs["deterministic"] = True
        if rand.random() < 0.15:
            kwargs["softcap"] = choose((1.0, 5.0, 30.0))
        if self.op == "attention":
            kwargs["is_causal"] = rand.random() < 0.4
            if rand.random() < 0.3:
                total = self.q_len + self.k_len
                sides = (
                    None,
                    -1,
                    0,
                    1,
                    7,
                    rand.randrange(0, total + 2),
                    rand.randrange(0, total + 2),
                    2**40,
                    2**63 - 1,
                )
                kwargs["window"] = choose((tuple, list))((choose(sides), choose(sides)))
            if rand.random() < 0.5 and not self.packed:
                kwargs["attn_mask"] = self._draw_attn_mask() if rand.random() < 0.5 else self._draw_bias()
            if rand.random() < 0.35 and not self.packed:
                kwargs["key_mask"] = self._draw_key_mask()
        else:
            kwargs["image_rows"] = choose(IMAGE_ROWS)
            kwargs["merge"] = choose(MERGES)
            kwargs["modality"] = self._integers(self._draw_modality())
            if rand.random() < 0.3:
                kwargs["image_id"] = self._integers(self._draw_runs((0, 1, -1, 7)))
            if kwargs["merge"] == "gate":
                kwargs["gate"] = self._draw_gate()

    def _draw_attn_mask(self):
        shape = self._draw_attn_mask_shape()
        rank = len(shape)
        mask = self._bernoulli(shape, self.random.choice((0.0, 0.1, 0.5, 0.9, 1.0)))
        if rank >= 2 and self.random.random() < 0.4:
            mask = mask & self._bernoulli([*shape[:-1], 1], 0.7)  # whole rows see nothing
        if rank >= 2 and self.random.random() < 0.4:
            mask = mask & self._bernoulli([*shape[:-2], 1, shape[-1]], 0.6)  # whole columns are never seen
        return self._restride(mask)

    def _draw_bias(self):
        bias = self._values(self._draw_attn_mask_shape(), self.random.choice((1.0, 1.0, 0.1, 30.0)))
        bias = bias.to(self.random.choice((self.dtype, torch.float32, torch.bfloat16, torch.float64)))
        if self.random.random() < 0.4:
            bias = bias.masked_fill(self._bernoulli(bias.shape, self.random.choice((0.05, 0.5, 0.95))), -math.inf)
        return self._restride(bias)

    def _draw_attn_mask_shape(self):
        rank = self.random.choice((4, 4, 3, 2, 2, 1, 0))
        shape = [self.batch, self.heads, self.q_len, self.k_len][4 - rank :]
        return [1 if self.random.random() < 0.3 else size for size in shape]

    def _draw_gate(self):
        rank = self.random.choice((4, 4, 3, 1, 0))
        shape = [*((self.q_len, self.heads) if self.packed else (self.batch, self.heads, self.q_len)), 2]
        shape = [1 if self.random.random() < 0.3 else size for size in shape[max(0, len(shape) - rank) :]]
        gate = self._values(shape, 1.0).to(self.random.choice((self.dtype, torch.float32)))
        if self.random.random() < 0.3:
            gate = gate.masked_fill(self._bernoulli(shape, 0.5), 0.0)
        return self._restride(gate)

    def _draw_key_mask(self):
        rows = []
        for _ in range(self.batch):
            length, sort = self.random.randrange(self.k_len + 1), self.random.random()
            row = self._bernoulli([self.k_len], self.random.choice((0.2, 0.8)))
            if sort < 0.7:
                row = torch.arange(self.k_len) < length
                row = row.flip(0) if sort < 0.2 else row
            rows.append(row if sort < 0.95 else torch.zeros(self.k_len, dtype=torch.bool))
        return self._restride(torch.stack(rows) if rows else torch.zeros(0, self.k_len, dtype=torch.bool))

    def _draw_modality(self):
        kinds = self.random.choice(((1, 2), (1, 2), (0, 1, 2), (0, 1, 2, 3, 9), (1, 1, 1, 2), (1,), (2,), (2, 3), (0,)))
        ids = self._draw_runs(kinds)
        if self.random.random() < 0.3:  # images first
            ids[:, : self.random.randrange(self.k_len + 1)] = 2
        if self.random.random() < 0.3:  # a padded end
            ids[:, self.random.randrange(self.k_len + 1) :] = 0
        return ids

    def _draw_runs(self, values):
        longest = self.random.choice((1, 3, 12, 100))
        rows = []
        for _ in range(self.batch):
            row = []
            while len(row) < self.k_len:
                row += [self.random.choice(values)] * self.random.randint(1, longest)
            rows.append(row[: self.k_len])
        return torch.tensor(rows, dtype=torch.int64).reshape(self.batch, self.k_len)

    def _integers(self, ids):
        dtypes = [torch.int32, torch.int64, torch.int64, torch.int16, torch.int8]
        ids = ids[0] if self.packed else ids
        return self._restride(ids.to(self.random.choice(dtypes)))

    def _bernoulli(self, shape, p):
        return torch.rand(shape, generator=self.generator) < p

    def _restride(self, mask):
        """The same mask, sometimes transposed or sliced out of something larger."""
        sort = self.random.random()
        if sort < 0.25 and mask.dim() >= 2:
            return mask.transpose(-1, -2).contiguous().transpose(-1, -2)
        if sort < 0.5 and mask.dim() >= 1:
            return torch.stack((mask, torch.zeros_like(mask)), -1)[..., 0]
        return mask

    # Tensors.

    def _draw_tensors(self):
        b, h, g = self.batch, self.heads, self.kv_heads
        shapes = (
            (b, h, self.q_len, self.head_dim),
            (b, g, self.k_len, self.head_dim),
            (b, g, self.k_len, self.value_dim),
            (b, h, self.q_len, self.value_dim),
        )
        hidden = self._hidden_keys() if self.poison else None
        tensors = []
        for i, (shape, layout) in enumerate(zip(shapes, self.layouts, strict=True)):
            magnitude = self.magnitude if i < 2 else self.random.choice((1.0, 1.0, 1e-4, 100.0))
            poisoned = hidden if i in (1, 2) else None
            tensors.append(self._lay_out(self._values(shape, magnitude), layout, poisoned))
        if self.packed:
            tensors = [t[0].transpose(0, 1) for t in tensors]
        self.query, self.key, self.value, self.grad_out = tensors
        if self.kwargs.get("merge") == "none":
            self.grad_out = torch.stack((self.grad_out, self._values(self.grad_out.shape, 1.0)))
        lse_shape = (h, self.q_len) if self.packed else (b, h, self.q_len)
        if self.op == "mmca_attention":
            lse_shape = (2, *lse_shape)
        self.grad_lse = self._values(lse_shape, 1.0).to(self.statistic_dtype)
        if self.random.random() < 0.3:
            self.grad_lse = self.grad_lse.transpose(-1, -2).contiguous().transpose(-1, -2)

    @property
    def statistic_dtype(self):
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def _values(self, shape, magnitude):
        if self.integers:
            return torch.randint(-3, 4, shape, generator=self.generator).to(self.dtype)
        return (magnitude * torch.randn(shape, generator=self.generator, dtype=torch.float64)).to(self.dtype)

    def _lay_out(self, tensor, layout, hidden):
        """The tensor in another layout. Memory that is not its own is NaN: a kernel that uses it gives itself away."""
        rand, (b, h, length, d) = self.random, tensor.shape
        fill = torch.full
        if layout == "expanded":
            dim = rand.randrange(4)
            narrow = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
            return narrow.expand(tensor.shape)
        if hidden is not None:  # what no row sees may be anything
            garbage = torch.tensor([math.nan, math.inf, -math.inf, 3e38], dtype=self.dtype)
            tensor = torch.where(hidden[..., None], garbage[rand.randrange(4)], tensor)
        if layout == "contiguous":
            return tensor
        if layout == "rows":
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "permuted":
            order = rand.sample(range(4), 4)
            inverse = [order.index(i) for i in range(4)]
            return tensor.permute(order).contiguous().permute(inverse)
        if layout == "sliced":
            view = fill((b + 1, h + 2, length + 3, d + 5), math.nan, dtype=self.dtype)[1:, 1:-1, 2:-1, 3:-2]
        elif layout == "offset":
            shift = rand.randrange(1, 8)
            view = fill((tensor.numel() + shift + 9,), math.nan, dtype=self.dtype)[shift : shift + tensor.numel()]
            view = view.view(tensor.shape)
        elif layout == "features":
            step = rand.choice((2, 3))
            view = fill((b, h, length, step * d), math.nan, dtype=self.dtype)[..., ::step]
        else:
            before, after = rand.randrange(4), rand.randrange(4)  # the other heads of a fused projection
            view = fill((b, length, before + h + after, d), math.nan, dtype=self.dtype)
            view = view[:, :, before : before + h].transpose(1, 2)
        return view.copy_(tensor)

    def visible(self):
        """Boolean (groups, B, Hq, Lq, Lk); packed sequences lie along the diagonal of one batch."""
        groups = 2 if self.op == "mmca_attention" else 1
        if not self.packed:
            return self._visible(
                self.batch, self.q_len, self.k_len, self.kwargs.get("modality"), self.kwargs.get("image_id")
            )
        visible = torch.zeros(groups, 1, self.heads, self.q_len, self.k_len, dtype=torch.bool)
        for (q, q_end), (k, k_end) in self.sequences():
            ids = [None if t is None else t[None, k:k_end] for t in map(self.kwargs.get, ("modality", "image_id"))]
            visible[..., q:q_end, k:k_end] = self._visible(1, q_end - q, k_end - k, *ids)
        return visible

    def _visible(self, batch, q_len, k_len, modality, image_id):
        shape, kwargs = (batch, self.heads, q_len, k_len), self.kwargs
        rows = positions(q_len, k_len, "cpu")
        if self.op == "mmca_attention":
            text, image, _ = visible_groups(modality.long(), rows, kwargs["image_rows"], image_id)
            return torch.stack([group[:, None].expand(shape) for group in (text, image)])
        window = [-1 if side is None else side for side in kwargs.get("window", (-1, -1))]
        visible = visible_by_order(rows, k_len, kwargs.get("is_causal", False), window).expand(shape)
        if "attn_mask" in kwargs:
            mask = kwargs["attn_mask"]
            visible = visible & (mask if mask.dtype == torch.bool else mask != -math.inf)
        if "key_mask" in kwargs:
            visible = visible & kwargs["key_mask"][:, None, None, :]
        return visible[None]

    def dense(self, tensor):
        """(..., B, H, L, D) of a tensor laid out like query or out."""
        return tensor.transpose(-3, -2).unsqueeze(-4) if self.packed else tensor

    def _hidden_keys(self):
        """Boolean (B, Hkv, Lk): keys that no row of any of their query heads sees. CUDA promises only for those that no
        list of keys has: padding, and what belongs to no sequence."""
        if self.device != "cpu":
            return self._unlisted_keys()[:, None].expand(self.batch, self.kv_heads, self.k_len)
        seen = self.visible().any(0).any(-2)
        return ~seen.view(self.batch, self.kv_heads, self.share, self.k_len).any(2)

    def _unlisted_keys(self):
        if "modality" in self.kwargs:
            hidden = (self.kwargs["modality"] == 0).view(self.batch, self.k_len)
        else:
            hidden = ~self.kwargs.get("key_mask", torch.ones(self.batch, self.k_len, dtype=torch.bool))
        if self.packed:
            ends = [k_end for _, (_, k_end) in self.sequences()]
            hidden = hidden | (torch.arange(self.k_len) >= max(ends, default=0))
        return hidden

    def __str__(self):
        options = {
            name: (f"{str(value.dtype)[6:]}{tuple(value.shape)}{value.stride()}" if torch.is_tensor(value) else value)
            for name, value in self.kwargs.items()
        }
        return (
            f"{self.op} {str(self.dtype)[6:]} {self.isa}{' packed' * self.packed} "
            f"query {tuple(self.query.shape)} key {tuple(self.key.shape)} "
            f"value {tuple(self.value.shape)} layouts {'/'.join(self.layouts)} x{self.magnitude:g} "
            f"threads {self.threads} lse {self.return_lse} gradients {self.wanted} from {self.grads_arrive} {options}"
        )

    def repeat(self):
        device = "" if self.device == "cpu" else f" --device {self.device}"
        return f"python tests/cases.py {self.seed} {self.isa}{device}"


def given(op, query, key, value, grad_out, grad_lse=None, isa=None, threads=1, **kwargs):
    """A case of these very tensors, nothing drawn; with grad_lse also lse is returned and has that gradient. A bias or
    a gate gets a gradient if it requires one."""
    case = object.__new__(Case)
    case.seed, case.op, case.isa, case.threads, case.device = 0, op, isa, threads, devices.current
    case.wanted = (
        "query",
        "key",
        "value",
        *(n for n in ("attn_mask", "gate") if n in kwargs and kwargs[n].requires_grad),
    )
    case.kwargs = {name: t.detach() if torch.is_tensor(t) else t for name, t in kwargs.items()}
    case.packed = query.dim() == 3
    case.query, case.key, case.value, case.grad_out, case.grad_lse = query, key, value, grad_out, grad_lse
    q, k, v = map(case.dense, (query, key, value))
    (case.batch, case.heads, case.q_len, case.head_dim), case.dtype = q.shape, query.dtype
    case.kv_heads, case.k_len, case.value_dim = k.shape[1], k.shape[2], v.shape[3]
    case.share, case.magnitude, case.layouts = case.heads // case.kv_heads, 1.0, ["given"]
    case.return_lse, case.grads_arrive = grad_lse is not None, "out" if grad_lse is None else "both"
    if grad_lse is None:
        case.grad_lse = torch.zeros(())
    case.repeat = lambda: "see the test"
    return case


# ---------------------------------------------------------------- the check


def run(case, function, convert):
    """out, lse and the wanted gradients of one implementation, its floating-point inputs converted, as a dict."""
    kwargs = dict(case.kwargs, return_lse=case.return_lse, query=case.query, key=case.key, value=case.value)
    for name in GRADIENTS:
        if name in kwargs and kwargs[name].is_floating_point():
            kwargs[name] = convert(kwargs[name]).detach().requires_grad_(name in case.wanted)
    if kwargs.get("dropout_p"):
        kwargs["generator"] = torch.Generator().manual_seed(case.seed)
    result = function(**kwargs)
    two = case.return_lse or kwargs.get("merge") == "none"
    result = dict(zip(("out", "lse"), result, strict=True)) if two else {"out": result}
    seeds = {"out": case.grad_out, "lse": case.grad_lse}
    arriving = ("out", "lse") if case.grads_arrive == "both" else (case.grads_arrive,)
    arriving = [name for name in arriving if result[name].requires_grad]  # the reference's lse does not depend on value
    inputs = [kwargs[name] for name in case.wanted]
    gradients = [None] * len(inputs)
    if arriving:
        seeds = [seeds[name].to(result[name].dtype) for name in arriving]
        gradients = torch.autograd.grad([result[name] for name in arriving], inputs, seeds, allow_unused=True)
    for name, argument, gradient in zip(case.wanted, inputs, gradients, strict=True):
        result[GRADIENTS[name]] = torch.zeros_like(argument) if gradient is None else gradient
    return {name: t.detach() for name, t in result.items()}


def run_reference(case, dtype):
    return run(case, getattr(reference, case.op), lambda t: t.to(dtype).contiguous())


def run_standard(case):
    """The standard implementation at the case's precision. On the CPU the kernels' weights are float32, and it is held
    to that; CUDA's tensor cores take weights of 16 bits, as the usual code does (accuracy.py)."""
    if case.device == "cpu":
        return run_reference(case, case.dtype)
    from accuracy import standard_implementation

    with standard_implementation():
        return run_reference(case, case.dtype)


def run_kernels(case):
    """The operators on the case's device, under its instruction set and number of threads."""
    threads, isa = torch.get_num_threads(), _C.forced_isa()
    _C.force_isa(case.isa)
    torch.set_num_threads(case.threads)
    try:
        with devices.on(case.device):
            return run(case, getattr(functional, case.op), lambda t: t)
    finally:
        _C.force_isa(isa)
        torch.set_num_threads(threads)


def rms_error(actual, exact):
    """RMS error where the exact result is finite; infinite if the two are not finite in the same places."""
    finite = exact.isfinite()
    if not torch.equal(actual.isfinite(), finite):
        return math.inf
    return float((actual.double() - exact)[finite].square().mean().sqrt()) if finite.any() else 0.0


def excess(actual, exact, bound):
    """error / bound where it is largest, with its place; inf where one is finite and the other is not. What is too
    large for the dtype, or may be so within the bound, may be infinite."""
    if not exact.numel():
        return 0.0, ()
    largest, actual = torch.finfo(actual.dtype).max, actual.double()
    overflow = (exact.abs() + bound > largest) & (actual == exact.sign() * torch.inf)
    error = torch.where((actual == exact) | overflow, 0.0, (actual - exact).abs())
    ratio = torch.where(error == 0.0, 0.0, error / bound)
    ratio = torch.where(ratio.isnan(), torch.inf, ratio)
    place = int(ratio.argmax())
    return float(ratio.flatten()[place]), tuple(int(i) for i in torch.unravel_index(torch.tensor(place), exact.shape))


def follows_layout(result, like):
    """The layout rule of the operators: heads inside rows where `like` has them so, else (B, H, L, D)."""
    if like.dim() == 4 and like.stride(1) < like.stride(2):
        result = result.transpose(-3, -2)
    return result.is_contiguous()


def ratios(case):
    """error / bound of every result: name -> (ratio, place). Checks on the way what is not a matter of rounding."""
    arguments = {"query": case.query, "key": case.key, "value": case.value, **case.kwargs}
    memory = {name: _bytes(t).clone() for name, t in arguments.items() if torch.is_tensor(t)}
    grads = _bytes(case.grad_out).clone()
    actual = run_kernels(case)
    for name, before in memory.items():
        assert torch.equal(_bytes(arguments[name]), before), f"{name} was written to"
    assert torch.equal(_bytes(case.grad_out), grads), "grad_out was written to"

    exact = run_reference(case, torch.float64)
    bound = bounds(case, exact)
    likes = {"out": case.query, "dq": case.query, "dk": case.key, "dv": case.value}
    dtypes = {GRADIENTS[name]: arguments[name].dtype for name in case.wanted}
    dtypes.update(out=case.dtype, lse=case.statistic_dtype)
    for name, result in actual.items():
        assert result.shape == exact[name].shape and result.dtype == dtypes[name], (
            f"{name}: {result.dtype} {result.shape}"
        )
        assert name not in likes or follows_layout(result, likes[name]), f"{name} has strides {result.stride()}"
    found = {name: excess(actual[name], exact[name], bound[name]) for name in exact}
    outside = [name for name, (ratio, _) in found.items() if ratio > 1.0]
    if outside and case.dtype != torch.float64:
        standard = run_standard(case)
        for name in outside:
            ours, theirs = rms_error(actual[name], exact[name]), rms_error(standard[name], exact[name])
            if 0.0 < ours <= 2 * theirs < math.inf:
                found[name] = (1.0, found[name][1])
    return found


def _bytes(tensor):
    """All memory behind a tensor."""
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())


def check(case):
    """Raises AssertionError unless the kernels agree with the reference in fp64 within the a-priori bound."""
    try:
        found = ratios(case)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{case}\nrepeat: {case.repeat()}") from error
    wrong = {name: value for name, value in found.items() if not value[0] <= 1.0}
    if wrong:
        listing = ", ".join(f"{name} is {ratio:.3g} times its bound off at {at}" for name, (ratio, at) in wrong.items())
        raise AssertionError(f"{listing}\n{case}\nrepeat: {case.repeat()}")


def main(arguments):
    parser = argparse.ArgumentParser(description="Repeats one case.")
    parser.add_argument("seed", type=int)
    parser.add_argument("isa", nargs="?", choices=ISAS)
    parser.add_argument("--device", choices=devices.DEVICES, default="cpu")
    options = parser.parse_args(arguments)
    case = Case(options.seed, options.isa, options.device)
    print(case)
    for name, (ratio, place) in ratios(case).items():
        print(f"{name}: error / bound = {ratio:.3g} at {place}")
    check(case)


if __name__ == "__main__":
    main(sys.argv[1:])
