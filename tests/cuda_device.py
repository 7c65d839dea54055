"""The operators on a GPU for CPU tensors: arguments are copied there with their strides and all memory behind them,
results are copied back. So every suite written for the CPU holds the CUDA kernels to the same."""

import torch

import mmca_ext  # noqa: F401 (the operators must be there before their implementation is replaced)

_registration = None


def _moved(t):
    """The tensor on the GPU, in a copy of its whole storage."""
    memory = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return memory.cuda().as_strided(t.shape, t.stride(), t.storage_offset())


def _on_gpu(op):
    names = [argument.name for argument in op._schema.arguments]

    def run(*arguments):
        moved = [
            _moved(value) if isinstance(value, torch.Tensor) and name != "rng_state" else value
            for name, value in zip(names, arguments, strict=True)
        ]
        return tuple(result.cpu() for result in op(*moved))

    return run


def enable(on):
    global _registration
    if _registration is not None:
        _registration._destroy()
        _registration = None
    if on:
        if not torch.cuda.is_available():
            raise RuntimeError("--device cuda: torch sees no GPU here")
        _registration = torch.library.Library("mmca_ext", "IMPL")
        for name in ("attention", "attention_backward", "linear_attention", "linear_attention_backward"):
            op = getattr(torch.ops.mmca_ext, name).default
            _registration.impl(name, _on_gpu(op), "CPU", allow_override=True)
