"""Attention for vision-language models as compiled PyTorch operators: grouped-query, cross and multi-modal causal.

mmca_ext.functional   attention, mmca_attention, ...: the operators
mmca_ext.nn           the layers; each also importable from mmca_ext itself
mmca_ext.reference    the same functions in readable PyTorch, without a kernel
"""

from . import _load

_load.load()  # registers torch.ops.mmca_ext.*, or says in one line what is missing

from . import _linear_ops as _linear_ops  # noqa: E402
from . import _ops as _ops  # noqa: E402
from . import functional, nn, reference  # noqa: E402
from .nn import (  # noqa: E402
    MGQA,
    KVCache,
    LinearCache,
    MultiModalCausalAttention,
    MultiModalCrossAttention,
    RotaryEmbedding,
    SimpleMMCA,
)

__version__ = "0.1.0"

__all__ = [
    "MGQA",
    "KVCache",
    "LinearCache",
    "MultiModalCausalAttention",
    "MultiModalCrossAttention",
    "RotaryEmbedding",
    "SimpleMMCA",
    "functional",
    "nn",
    "reference",
]
