"""The layers: projections around the operators of `mmca_ext.functional`."""

from .cross_attention import MultiModalCrossAttention
from .mgqa import MGQA
from .multimodal_causal_attention import MultiModalCausalAttention
from .simple_mmca import SimpleMMCA, SimpleMMCAOutput

__all__ = ["MGQA", "MultiModalCausalAttention", "MultiModalCrossAttention", "SimpleMMCA", "SimpleMMCAOutput"]
