"""What a Wan 2.1 text-to-video transformer is made of. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from ..shapes import LATENT_CHANNELS, PATCH

HEAD_DIM = 128  # every Wan model; hosts detect the number of heads as dim / 128
FREQ_DIM = 256  # sinusoidal timestep features


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of one transformer. All but `text_len` can be read from the tensors of a file."""

    dim: int
    ffn_dim: int
    layers: int
    text_dim: int = 4096
    text_len: int = 512  # prompts are zero-padded to this many tokens, without a mask

    @property
    def heads(self) -> int:
        return self.dim // HEAD_DIM

    @property
    def patch_values(self) -> int:
        """Values that one token stands for: channels x 1 x 2 x 2."""
        return LATENT_CHANNELS * PATCH * PATCH
