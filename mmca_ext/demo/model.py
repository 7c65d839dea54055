"""A captioner of about 150,000 parameters, built from the layers of mmca_ext.

    25 patches ── MGQA block, bidirectional ──┐
                                              ├─ one sequence: MultiModalCausalAttention block ─┬─ patches ─┐
    words so far ─────────────────────────────┘                                                 └─ text ────┤
                                          next word ── MultiModalCrossAttention block, text to patches ─────┘

MultiModalCausalAttention gives each word one softmax over the earlier words and one over the patches; there a patch
attends to itself only, so the patches exchange what they know in the MGQA block before it.
"""

import pickle
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from mmca_ext import MGQA, MultiModalCausalAttention, MultiModalCrossAttention, functional, reference

from . import data
from .problem import Problem

TEXT, IMAGE = 1, 2  # modality ids; 0 is padding


@dataclass(frozen=True)
class CaptionerConfig:
    """Sizes of a Captioner.

    The patches are grid x grid windows of `patch` pixels (a digit's size), `stride` apart, so they overlap: digits may
    stand anywhere, and 25 such windows find them better than 16 that tile the canvas.
    """

    dim: int = 80
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 160
    patch: int = 8
    stride: int = 3
    grid: int = 5
    image_rows: str = "self"
    merge: str = "sum"


class Block(nn.Module):
    """A pre-norm transformer block around any of the attention layers: x + attention, then x + MLP."""

    def __init__(self, attention: nn.Module, config: CaptionerConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.attention = attention
        self.mlp = nn.Sequential(
            nn.LayerNorm(config.dim),
            nn.Linear(config.dim, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.dim),
        )

    def forward(self, x, *source):
        """x (B, N, dim); `source` is the attention layer's second argument, if it has one: modality or context."""
        x = x + self.attention(self.norm(x), *source)
        return x + self.mlp(x)


class Captioner(nn.Module):
    """Canvases to captions, one word at a time."""

    def __init__(self, config: CaptionerConfig | None = None):
        super().__init__()
        self.config = config = config or CaptionerConfig()
        dim, heads, head_dim = config.dim, config.heads, config.dim // config.heads
        span = config.stride * (config.grid - 1) + config.patch  # of all windows; what exceeds the canvas is padding
        self.to_patches = nn.Conv2d(1, dim, config.patch, config.stride, (span - data.CANVAS) // 2)
        self.patch_position = nn.Parameter(0.02 * torch.randn(config.grid**2, dim))
        self.embedding = nn.Embedding(len(data.VOCABULARY), dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.text_position = nn.Parameter(0.02 * torch.randn(data.CAPTION_TOKENS, dim))

        self.vision = Block(MGQA(dim, heads, config.kv_heads, head_dim), config)
        self.multimodal = Block(
            MultiModalCausalAttention(
                dim, heads, config.kv_heads, head_dim, image_rows=config.image_rows, merge=config.merge
            ),
            config,
        )
        self.cross = Block(MultiModalCrossAttention(dim, heads, dim, head_dim, dropout=0.0), config)
        self.norm = nn.LayerNorm(dim)
        self.to_words = nn.Linear(dim, len(data.VOCABULARY))

    def encode(self, images):
        """Canvases (B, 16, 16) to patch features (B, grid^2, dim)."""
        patches = self.to_patches(images.unsqueeze(1)).flatten(2).transpose(1, 2)
        return self.vision(patches + self.patch_position)

    def interleave(self, patches, tokens):
        """Runs patches (B, P, dim) and tokens (B, T) through the multi-modal block: (text, patches) features."""
        text = self.embedding(tokens) + self.text_position[: tokens.shape[1]]
        modality = torch.full(patches.shape[:2], IMAGE, device=tokens.device)
        modality = torch.cat([modality, torch.where(tokens == data.PAD_ID, 0, TEXT)], dim=1)
        x = self.multimodal(torch.cat([patches, text], dim=1), modality)
        return x[:, patches.shape[1] :], x[:, : patches.shape[1]]

    def next_words(self, patches, tokens):
        """Logits (B, T, V): row t scores the word that follows token t."""
        text, patches = self.interleave(patches, tokens)
        return self.to_words(self.norm(self.cross(text, patches)))

    def forward(self, images, tokens):
        """Canvases (B, 16, 16) and caption tokens (B, T), <start> first, to logits (B, T, V)."""
        return self.next_words(self.encode(images), tokens)

    @torch.no_grad()
    def generate(self, images):
        """Greedy captions: tokens (B, CAPTION_TOKENS), <start> first and <pad> after <end>; probabilities, same shape.

        A probability is the model's confidence in that token; 1 for <start> and <pad>, which it does not choose.
        """
        patches = self.encode(images)
        tokens = torch.full((len(images), 1), data.START_ID, device=images.device)
        confidence = torch.ones(len(images), 1, device=images.device)
        ended = torch.zeros_like(tokens, dtype=torch.bool)
        while tokens.shape[1] < data.CAPTION_TOKENS:
            logits = self.next_words(patches, tokens)[:, -1:].float().flatten(1)
            probability, word = logits.softmax(-1).max(-1, keepdim=True)
            tokens = torch.cat([tokens, word.masked_fill(ended, data.PAD_ID)], dim=1)
            confidence = torch.cat([confidence, probability.masked_fill(ended, 1.0)], dim=1)
            ended |= word == data.END_ID
        return tokens, confidence

    @torch.no_grad()
    def attention_maps(self, images, tokens):
        """Where the last layer looked: (B, T, grid, grid), row t while choosing the word that follows token t.

        The exact softmax weights of the cross-attention, averaged over its heads; each map sums to 1.
        """
        text, patches = self.interleave(self.encode(images), tokens)
        attention = self.cross.attention
        split = (attention.heads, attention.dim_head)
        query = attention.to_q(self.cross.norm(text)).unflatten(-1, split).transpose(1, 2)
        key = attention.to_k(patches).unflatten(-1, split).transpose(1, 2)
        # The kernel keeps no weights, only each row's log-sum-exp; from that they are recomputed.
        _, lse = functional.attention(query, key, key, return_lse=True)
        weights = reference.attention_map(query, key, lse).mean(1)
        return weights.unflatten(-1, (self.config.grid, self.config.grid))


def save_checkpoint(model: Captioner, path: Path) -> None:
    """Plain tensors, numbers and strings: it loads with torch.load(weights_only=True)."""
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    torch.save({"config": asdict(model.config), "vocabulary": list(data.VOCABULARY), "state_dict": state}, path)


def load_checkpoint(path: Path, device: str = "cpu") -> Captioner:
    """The model of save_checkpoint, in eval mode; Problem if there is none in that file."""
    if not Path(path).is_file():
        raise Problem(f"no model at {path}: run `python -m mmca_ext.demo train` first, or name one with --model")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        model = Captioner(CaptionerConfig(**content["config"]))
        model.load_state_dict(content["state_dict"])
        vocabulary = tuple(content["vocabulary"])
    except (pickle.UnpicklingError, OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Problem(f"{path} is not a model of this demo, or is damaged ({reason[:100]})") from None
    if vocabulary != data.VOCABULARY:
        raise Problem(f"{path} was trained with another vocabulary: train again")
    return model.to(device).eval()
