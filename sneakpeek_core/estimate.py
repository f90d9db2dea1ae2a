"""What a generation will need in memory, from file headers alone, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import psutil
import torch

from .cache import CacheSpec
from .model.config import HEAD_DIM, ModelConfig
from .settings import SamplerSettings
from .shapes import PATCH, SPATIAL
from .vae.streaming import decode_peak_bytes, decoder_state_bytes

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The sizes an estimate is made from. `width` and `height` in pixels."""

    config: ModelConfig
    parameters: int
    vae_dim: int
    width: int
    height: int
    latent_frames: int
    settings: SamplerSettings
    dtype: torch.dtype
    vae_dtype: torch.dtype

    @property
    def cache(self) -> CacheSpec:
        policy, chunk = self.settings.policy, self.settings.chunk
        return CacheSpec(
            layers=self.config.layers,
            heads=self.config.heads,
            head_dim=HEAD_DIM,
            rows=self.height // (SPATIAL * PATCH),
            columns=self.width // (SPATIAL * PATCH),
            past=policy.capacity(self.latent_frames + chunk - 1),
            future=self.settings.keyframes,
            batch=len(self.settings.seeds),
            dtype=self.dtype,
        )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes, by what they are for. `str()` gives lines for a terminal."""

    weights: int
    past: int
    future: int
    decoder_state: int
    decoder_peak: int  # with its states
    pass_peak: int  # activations of one forward, roughly
    free: int | None
    advice: tuple[str, ...]

    @property
    def total(self) -> int:
        """Bytes needed at once: decoding and denoising take turns."""
        work = max(self.pass_peak + self.decoder_state, self.decoder_peak)
        return self.weights + self.past + self.future + work

    def __str__(self) -> str:
        rows = [
            ("weights", self.weights),
            ("cache, past region", self.past),
            ("cache, future region", self.future),
            ("decoder state", self.decoder_state),
            ("decoding a chunk, at most", self.decoder_peak),
            ("one forward, about", self.pass_peak),
            ("needed at once, about", self.total),
        ]
        lines = [f"{name:<26} {value / GIB:9.3f} GiB" for name, value in rows]
        if self.free is not None:
            verdict = "fits" if self.total <= self.free else "does not fit"
            lines.append(f"{'free here':<26} {self.free / GIB:9.3f} GiB: it {verdict}")
        return "\n".join([*lines, *self.advice])


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_cache_fits(plan: Plan, free: int) -> None:
    """Raise `ValueError` if the cache alone, whose size is exact, is beyond `free` bytes."""
    made = estimate(plan, free)
    needed = made.past + made.future
    if needed > free:
        raise ValueError(
            f"the cache needs {needed / GIB:.1f} GiB, but {free / GIB:.1f} GiB of memory are free; "
            f"{made.advice[0]}"
        )


def estimate(plan: Plan, free: int | None = None) -> Estimate:
    """Return what `plan` needs; with `free` bytes, also what to change when it does not fit."""
    branches = 2 if plan.settings.cfg > 1 else 1
    rows, columns = plan.height // SPATIAL, plan.width // SPATIAL
    vae_bytes = plan.vae_dtype.itemsize
    made = Estimate(
        weights=plan.parameters * plan.dtype.itemsize,
        past=branches * plan.cache.past_bytes,
        future=branches * plan.cache.future_bytes,
        decoder_state=decoder_state_bytes(plan.vae_dim, rows, columns, dtype_bytes=vae_bytes),
        decoder_peak=decode_peak_bytes(plan.vae_dim, rows, columns, dtype_bytes=vae_bytes),
        pass_peak=_pass_bytes(plan),
        free=free,
        advice=(),
    )
    if free is None or made.total <= free:
        return made
    return replace(made, advice=_advice(plan, made))


def _pass_bytes(plan: Plan) -> int:
    """Activations alive in one block: the FFN's hidden layer and some copies of the stream."""
    frames = plan.settings.chunk + plan.settings.keyframes
    tokens = frames * plan.cache.tokens_per_frame
    return tokens * (2 * plan.config.ffn_dim + 8 * plan.config.dim) * plan.dtype.itemsize


def _advice(plan: Plan, made: Estimate) -> tuple[str, ...]:
    policy = plan.settings.policy
    advice = []
    if plan.dtype == torch.float32:
        advice.append("halve it: --dtype bf16")
    smaller = max(2 * plan.settings.chunk, 6)
    if policy.window is None or policy.window > smaller:
        spared = made.past * (1 - (smaller + policy.sink) / plan.cache.past)
        advice.append(f"a smaller window: --window {smaller} spares {spared / GIB:.1f} GiB")
    if plan.settings.cfg > 1:
        advice.append(f"--cfg 1 needs one cache: {made.past / 2 / GIB:.1f} GiB less")
    width, height = (
        max(SPATIAL * PATCH, side // 2 // 16 * 16) for side in (plan.width, plan.height)
    )
    advice.append(f"a smaller picture: --size {width}x{height} needs about a quarter of the cache")
    return tuple(f"to make it fit, {line}" for line in advice)
