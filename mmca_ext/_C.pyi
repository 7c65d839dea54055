"""The compiled part: kernels and their binding. Importing it also registers torch.ops.mmca_ext.*"""

from typing import Any, Literal, TypedDict

from torch import Tensor

class Kernel(TypedDict):
    name: str
    op: Literal["attention_forward", "attention_backward", "linear_forward", "linear_backward"]
    dtype: str
    device: Literal["cpu", "cuda"]
    isa: str  # the instruction set, or of CUDA kernels the family
    available: bool  # it can run on this machine
    selected: bool  # it serves its (op, dtype, device)
    reason: str  # why it is, or is not, the one that serves
    launches: int  # how often it has run in this process

def build_info() -> dict[str, Any]: ...
def cpu_features() -> dict[str, bool]: ...
def kernels() -> list[Kernel]: ...
def forced_isa() -> str | None: ...
def force_isa(isa: str | None) -> None: ...

# The kernels themselves: no dispatcher, no autograd. Arguments as in the operators' schemas.

def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    gate: Tensor | None = None,
    key_mask: Tensor | None = None,
    modality: Tensor | None = None,
    image_id: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    rng_state: Tensor | None = None,
    save_for_backward: bool = False,
    image_rows: str = "self",
    merge: str = "sum",
    scale: float | None = None,
    softcap: float = 0.0,
    is_causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    group_out: Tensor,
    attn_mask: Tensor | None = None,
    gate: Tensor | None = None,
    key_mask: Tensor | None = None,
    modality: Tensor | None = None,
    image_id: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    rng_state: Tensor | None = None,
    attn_mask_gradient: bool = False,
    image_rows: str = "self",
    merge: str = "sum",
    scale: float | None = None,
    softcap: float = 0.0,
    is_causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...
def linear_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state_S: Tensor | None = None,
    state_z: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_state: bool = False,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]: ...
def linear_backward(
    grad_out: Tensor,
    grad_S: Tensor | None,
    grad_z: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state_S: Tensor | None = None,
    state_z: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...
