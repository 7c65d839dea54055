"""The examples of the two published documents run as printed, with the package name exchanged."""

import inspect

import torch

from mmca_ext import MultiModalCrossAttention, SimpleMMCA

EXCHANGED = {
    "from zeta.nn import": "from mmca_ext.nn import",
    "from mmca_mgqa.attention import": "from mmca_ext.attention import",
}

# MultiModalCrossAttention: three examples, each with the output it prints. The later ones use the first one's names.
BASIC_USAGE = """
import torch
from einops import rearrange
from torch import nn

from zeta.nn import MultiModalCrossAttention

# Create a MultiModalCrossAttention module
dim = 1024
heads = 8
context_dim = 1024
attn = MultiModalCrossAttention(dim, heads, context_dim)

# Generate random query and context tensors
query = torch.randn(1, 32, dim)
context = torch.randn(1, 32, context_dim)

# Perform multi-head cross-attention
output = attn(query, context)

# Print the shape of the output
print(output.shape)
"""

CONDITIONAL_LAYER_NORMALIZATION = """
# Create a MultiModalCrossAttention module with conditional layer normalization
attn = MultiModalCrossAttention(dim, heads, context_dim, qk=True)

# Generate random query and context tensors
query = torch.randn(1, 32, dim)
context = torch.randn(1, 32, context_dim)

# Perform multi-head cross-attention
output = attn(query, context)

# Print the shape of the output
print(output.shape)
"""

LAMBDA_MASKING = """
# Create a MultiModalCrossAttention module with lambda masking
mask = torch.randint(0, 2, (32, 32), dtype=torch.bool)
attn = MultiModalCrossAttention(dim, heads, context_dim, mask=mask)

# Generate random query and context tensors
query = torch.randn(1, 32, dim)
context = torch.randn(1, 32, context_dim)

# Perform multi-head cross-attention
output = attn(query, context)

# Print the shape of the output
print(output.shape)
"""

# SimpleMMCA
USAGE = """
import torch 
from mmca_mgqa.attention import SimpleMMCA

# Define the dimensions
dim = 512
head = 8
seq_len = 10
batch_size = 32

#attn
attn = SimpleMMCA(dim=dim, heads=head)

#random tokens
v = torch.randn(batch_size, seq_len, dim)
t = torch.randn(batch_size, seq_len, dim)

#pass the tokens throught attn
tokens = attn(v, t)

print(tokens)
"""  # noqa: W291


def run(source, names):
    for published, ours in EXCHANGED.items():
        source = source.replace(published, ours)
    exec(compile(source, "document", "exec"), names)


def test_cross_attention_examples(capsys):
    names = {}
    for example in (BASIC_USAGE, CONDITIONAL_LAYER_NORMALIZATION, LAMBDA_MASKING):
        run(example, names)
        assert capsys.readouterr().out == "torch.Size([1, 32, 1024])\n"
        assert names["output"].isfinite().all()
    assert names["attn"].mask is not None and names["MultiModalCrossAttention"] is MultiModalCrossAttention


def test_simple_mmca_example(capsys):
    names = {}
    run(USAGE, names)
    assert "tensor(" in capsys.readouterr().out
    visual, text = names["tokens"]
    assert visual.shape == text.shape == (32, 10, 512)
    assert visual.isfinite().all() and text.isfinite().all()
    assert names["SimpleMMCA"] is SimpleMMCA


def test_cross_attention_parameter_table():
    required, defaults = ["dim", "heads", "context_dim"], {"dim_head": 64, "dropout": 0.1, "qk": False}
    defaults |= {"post_attn_norm": False, "attention_strategy": None, "mask": None}
    parameters = list(inspect.signature(MultiModalCrossAttention).parameters.values())
    assert [p.name for p in parameters] == required + list(defaults)
    assert {p.name: p.default for p in parameters[3:]} == defaults


def test_simple_mmca_heads_of_the_document():
    layer = SimpleMMCA(dim=512, heads=8)
    assert layer.textual_self_attn.kv_heads == 2  # multi-grouped, as published
    assert [name for name, _ in layer.named_children()] == ["visual_self_attn", "textual_self_attn", "cross_attn"]
    assert layer(torch.randn(1, 3, 512), torch.randn(1, 5, 512))._fields == ("visual", "text")
