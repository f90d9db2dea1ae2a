"""Wan 2.1's text-to-video transformer as a tree of parameters, with the checkpoint's own names.

The tree computes nothing by itself: `forward.py` runs it, and runs any other tree with the same
attribute names (a host's own module) just as well.
"""

from __future__ import annotations

import torch
from torch import nn

from ..shapes import LATENT_CHANNELS, PATCH
from .config import FREQ_DIM, ModelConfig

NORM_EPS = 1e-6


class SelfAttention(nn.Module):
    """Projections and QK norms of self-attention. Cross-attention has the same parameters."""

    def __init__(self, dim: int):
        super().__init__()
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = nn.RMSNorm(dim, eps=NORM_EPS)
        self.norm_k = nn.RMSNorm(dim, eps=NORM_EPS)


class Block(nn.Module):
    """One transformer layer: modulated self-attention, cross-attention, modulated FFN."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim = config.dim
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.self_attn = SelfAttention(dim)
        self.norm3 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.cross_attn = SelfAttention(dim)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, dim),
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)


class Head(nn.Module):
    """Final modulated norm and the projection from a token to its patch."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, eps=NORM_EPS, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.patch_values)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)


class WanTransformer(nn.Module):
    """The whole tree. `config` says its sizes; the names are those of Wan 2.1 checkpoints."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        patch = (1, PATCH, PATCH)
        self.patch_embedding = nn.Conv3d(LATENT_CHANNELS, dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(FREQ_DIM, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.head = Head(config)
