"""The layers: projections around the operators of `mmca_ext.functional`, and what they need to generate."""

from .convert import from_mmqqa, to_mmqqa
from .cross_attention import MultiModalCrossAttention
from .kv_cache import KVCache
from .linear import LinearCache
from .mgqa import MGQA
from .multimodal_causal_attention import MultiModalCausalAttention
from .rotary import Llama3Scaling, RotaryEmbedding, RotaryTable
from .rotary_positions import rotary_positions
from .simple_mmca import SimpleMMCA, SimpleMMCACache, SimpleMMCAOutput

__all__ = [
    "MGQA",
    "KVCache",
    "LinearCache",
    "Llama3Scaling",
    "MultiModalCausalAttention",
    "MultiModalCrossAttention",
    "RotaryEmbedding",
    "RotaryTable",
    "SimpleMMCA",
    "SimpleMMCACache",
    "SimpleMMCAOutput",
    "from_mmqqa",
    "rotary_positions",
    "to_mmqqa",
]
