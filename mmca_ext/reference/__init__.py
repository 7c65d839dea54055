"""The whole functional API in readable PyTorch: any device, any float dtype, no kernel.

Same names and signatures as `mmca_ext.functional`, plus the keyword `rng_state` where there is dropout. Every function
materialises its weights, is differentiable by plain autograd, and computes in fp32 (fp64 for fp64 input): with fp64
tensors it is the oracle the kernels are tested against.
"""

from .attention import attention
from .linear import LinearState, linear_attention
from .mmca import mmca_attention
from .partial import attention_map, merge_attention
from .philox import dropout_mask

__all__ = [
    "LinearState",
    "attention",
    "attention_map",
    "dropout_mask",
    "linear_attention",
    "merge_attention",
    "mmca_attention",
]
