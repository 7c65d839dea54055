"""Training for a long time takes no more memory than training for a short time.

MMCA_EXT_SOAK_STEPS says how long: 500 steps in `make test`, 30,000 in `make soak`.
"""

import os
from pathlib import Path

import pytest
import torch

import mmca_ext

STEPS = int(os.environ.get("MMCA_EXT_SOAK_STEPS", "500"))


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class EveryLayer(torch.nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        sizes = {"heads": 4, "dim_head": 8, "dropout": 0.1}
        self.mmca = mmca_ext.MultiModalCausalAttention(dim, kv_heads=2, image_rows="block", **sizes)
        self.joint = mmca_ext.MultiModalCausalAttention(dim, merge="lse", **sizes)
        self.cross = mmca_ext.MultiModalCrossAttention(dim, context_dim=dim, **sizes)
        self.two = mmca_ext.SimpleMMCA(dim, **sizes)

    def forward(self, x, modality, mask):
        x = x + self.mmca(x, modality)
        x = x + self.joint(x, modality)
        x = x + self.cross(x, x, context_mask=mask)
        visual, text = self.two(x[:, 8:20], x[:, 20:])
        return visual.square().mean() + text.square().mean()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident size from /proc")
def test_memory_stays_flat():
    """A leak of 100 bytes a step would be 2.4 MB over the 80% of 30,000 steps that are compared; 1 MB is allowed for
    what the allocator and the interpreter do by themselves."""
    torch.manual_seed(0)
    model = EveryLayer()
    optimizer = torch.optim.AdamW(model.parameters())
    modality = torch.tensor([[1] * 8 + [2] * 12 + [1] * 10, [1] * 4 + [3] * 20 + [0] * 6])
    sizes = []
    for step in range(STEPS):
        # Lengths change, as they do in training: scratch must not grow with every new shape.
        length = 24 + step % 7
        x = torch.randn(2, length, 32)
        loss = model(x, modality[:, :length], modality[:, :length] > 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= STEPS // 5 and step % max(STEPS // 50, 1) == 0:
            sizes.append(resident_bytes())
    assert loss.isfinite()
    growth = max(sizes[len(sizes) // 2 :]) - max(sizes[: len(sizes) // 2])
    assert growth < 2**20, f"grew by {growth} bytes: {sizes}"
