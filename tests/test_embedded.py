"""The files that come along: small together, and the text encoder can be made again."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from sneakpeek_core.assembly import EMBEDDED
from sneakpeek_core.text_encoder import random_text_encoder

MOST_BYTES = 30_000_000


def test_weights_are_small_enough_for_a_repository():
    """All of them together."""
    assert 0 < sum(path.stat().st_size for path in EMBEDDED.glob("*.safetensors")) <= MOST_BYTES


def test_the_text_encoder_is_what_the_model_card_says():
    """Random weights of seed 0 in bf16, never trained."""
    found = load_file(EMBEDDED / "tiny_text_encoder.safetensors")
    expected = random_text_encoder(0).to(torch.bfloat16).state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
