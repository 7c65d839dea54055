"""Where the suites' operators run: `pytest --device`, for CPU tensors all.

cpu        the CPU's kernels
emulated   CUDA's kernels on an emulated GPU (tests/emulated_device.py), which is some thousand times slower
cuda       CUDA's kernels on a GPU: what the operators are given is copied there, what they return is copied back
"""

import contextlib

DEVICES = ("cpu", "emulated", "cuda")
# The largest random case, as a share of the CPU's.
SIZES = {"cpu": 1.0, "emulated": 0.1, "cuda": 1.0}
current = "cpu"


def use(device):
    """For the rest of the process."""
    global current
    _enable(device)
    current = device


@contextlib.contextmanager
def on(device):
    """For a while."""
    global current
    before = current
    if device != before:
        use(device)
    try:
        yield
    finally:
        if device != before:
            use(before)


def _enable(device):
    if "emulated" in (device, current):
        import emulated_device

        emulated_device.load().enable(device == "emulated")
    if "cuda" in (device, current):
        import cuda_device

        cuda_device.enable(device == "cuda")


def is_lost():
    """Whether an error has left this process without its GPU."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
