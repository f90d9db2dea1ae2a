"""Text to embeddings: the protocol, our tiny encoder, and the one way to load either kind.

Legend: B texts, L tokens (padding included where there is a B), D width.
"""

from __future__ import annotations

import logging
import math
import re
import unicodedata
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model.checkpoint import read_checkpoint
from .model.initial import randomise
from .model.recognise import recognise
from .model.weights import KIND, fill, save_model

log = logging.getLogger(__name__)
MAX_TOKENS = 512
BUCKETS = 4096  # words that share one are not told apart; 4095 are left to words
HEAD_DIM = 32
_EMPTY = 0  # the one token of an empty text
# Scripts without spaces give a token per character; elsewhere a word is a token, and so is a sign.
_NO_SPACES = "぀-ヿ㐀-鿿豈-﫿฀-๿"
_TOKEN = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+|[^\w\s]")


class TextEncoder(Protocol):
    """Turns texts into what the transformer attends to."""

    def __call__(self, texts: list[str]) -> list[Tensor]:
        """Return for each text [L, text_dim] in float32, unpadded, 1 <= L <= 512."""
        ...


class TinyTextEncoder(nn.Module):
    """Hashed words, one pre-norm transformer layer, and a projection to the width of UMT5-XXL.

    It has no vocabulary file, so any text in any language has tokens; it knows only the words
    that it was trained on.
    """

    def __init__(
        self, *, width: int = 128, ffn: int = 512, text_dim: int = 4096, buckets: int = BUCKETS
    ):
        super().__init__()
        self.buckets = buckets
        self.embedding = nn.Embedding(buckets, width)
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn), nn.GELU(), nn.Linear(ffn, width))
        self.norm = nn.LayerNorm(width)
        self.to_text = nn.Linear(width, text_dim)

    def tokenize(self, text: str) -> list[int]:
        """Return 1 to 512 bucket numbers; longer texts are cut, with a warning."""
        words = _TOKEN.findall(unicodedata.normalize("NFKC", text).lower())
        if len(words) > MAX_TOKENS:
            log.warning("text of %d tokens is cut to %d", len(words), MAX_TOKENS)
        hashes = [1 + zlib.crc32(word.encode()) % (self.buckets - 1) for word in words]
        return hashes[:MAX_TOKENS] or [_EMPTY]

    def forward(self, texts: list[str]) -> list[Tensor]:
        """Return [L, text_dim] float32 for each text, the same in a batch as alone."""
        if not texts:
            return []
        ids = [self.tokenize(text) for text in texts]
        device = self.embedding.weight.device
        ids_BL = nn.utils.rnn.pad_sequence([torch.tensor(i) for i in ids], batch_first=True)
        lengths = torch.tensor([len(i) for i in ids])
        mask_BL = torch.arange(ids_BL.shape[1]) < lengths[:, None]
        embeds_BLD = self.embed(ids_BL.to(device), mask_BL.to(device)).float()
        return [row[: len(i)] for row, i in zip(embeds_BLD, ids, strict=True)]

    def embed(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Return [B, L, text_dim] of bucket numbers; `mask_BL` is True where there is a token."""
        x = self.embedding(ids_BL)
        # Scaled as in Vaswani et al. 2017, or positions would drown what the words say.
        x = x * x.shape[2] ** 0.5 + _positions(x.shape[1], x.shape[2]).to(x)
        x = x + self.attention(self.norm1(x), mask_BL)
        x = x + self.ffn(self.norm2(x))
        return self.to_text(self.norm(x))


class _Attention(nn.Module):
    """Bidirectional self-attention with a mask over the keys."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = width // HEAD_DIM
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        qkv = self.qkv(x_BLD).unflatten(-1, (3, self.heads, HEAD_DIM))
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BL[:, None, None])
        return self.out(y.transpose(1, 2).flatten(2))


def random_text_encoder(seed: int, text_dim: int = 4096) -> TinyTextEncoder:
    """Return a tiny encoder with random weights, the same for the same seed, in eval mode."""
    with torch.device("meta"):
        encoder = TinyTextEncoder(text_dim=text_dim)
    return randomise(encoder.to_empty(device="cpu"), seed).eval()


def save_text_encoder(
    path: str | Path, encoder: TinyTextEncoder, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a tiny encoder to safetensors."""
    save_model(path, encoder.state_dict(), {KIND: "text_encoder", **(metadata or {})})


def load_text_encoder(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """Load a file of ours, or UMT5-XXL from a file or a Hugging Face folder (extra `umt5`)."""
    path = Path(path)
    if path.is_dir():
        from .umt5 import load_umt5

        return load_umt5(path, device, dtype)
    checkpoint = read_checkpoint(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    found = recognise(shapes)
    if "to_text.weight" in shapes:
        return _load_tiny(path, checkpoint.tensors, device, dtype)
    if found.kind == "text encoder":
        from .umt5 import load_umt5

        return load_umt5(path, device, dtype)
    raise ValueError(
        f"{path.name}: this looks like {found.label}, not a text encoder; "
        "give umt5_xxl_fp16.safetensors, or the tiny one that comes with SneakPeek"
    )


def _load_tiny(
    path: Path, tensors: dict[str, Tensor], device: torch.device | str, dtype: torch.dtype
) -> TinyTextEncoder:
    try:
        buckets, width = tensors["embedding.weight"].shape
        ffn, text_dim = len(tensors["ffn.0.weight"]), len(tensors["to_text.weight"])
        with torch.device("meta"):
            encoder = TinyTextEncoder(width=width, ffn=ffn, text_dim=text_dim, buckets=buckets)
        return fill(encoder, tensors, dtype, device)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path.name} is not a whole tiny text encoder: {error}") from error


def _positions(tokens: int, width: int) -> Tensor:
    """Return the sinusoids [tokens, width]; unlike learned ones they exist for any length."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(tokens)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)
