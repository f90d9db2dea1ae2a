"""Sampling options as the settings that the core works with."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TypeVar

from ..guidance import FutureGuidance
from ..model.presets import Preset
from ..policy import CachePolicy
from ..settings import SamplerSettings
from ..sigmas import uniform_sigmas

# Guidance options and the fields of `FutureGuidance` they set.
GUIDANCE = {
    "guidance": "mode",
    "horizon": "count",
    "strength": "strength",
    "plan_passes": "plan_passes",
    "guided_passes": "first_passes",
    "keyframe_sigma": "context_sigma",
    "refresh": "refresh",
}
Value = TypeVar("Value")


def settings_of(
    options: argparse.Namespace, preset: Preset, *, goals: bool, base: SamplerSettings | None = None
) -> SamplerSettings:
    """Return the preset's settings (or `base`, a cache's) with the options that were given on top.

    Raises `ValueError` in words.
    """
    base = base or settings_of_preset(preset)
    window = base.policy.window if options.window is None else _window(options.window)
    sigmas = _sigmas(options, preset)
    return SamplerSettings(
        sigmas=sigmas or base.sigmas,
        first_sigmas=None if sigmas else base.first_sigmas,
        chunk=either(options.chunk, base.chunk),
        solver=either(options.solver, base.solver),
        cfg=either(options.cfg, base.cfg),
        context_sigma=either(options.context_sigma, base.context_sigma),
        span=base.span,
        seeds=base.seeds if options.seed is None else (options.seed,),
        policy=CachePolicy(
            sink=either(options.sink, base.policy.sink),
            window=window,
            positions=either(options.positions, base.policy.positions),
            policy=either(options.policy, base.policy.policy),
        ),
        guidance=_guidance(options, base.guidance, goals),
    )


def either(value: Value | None, default: Value) -> Value:
    """Return what was given, else the default."""
    return default if value is None else value


def is_count(text: str) -> bool:
    """Say whether a text is a whole number of sensible length."""
    return text.isdecimal() and len(text) <= 9


def _window(text: str) -> int | None:
    if text == "all":
        return None
    if not is_count(text):
        raise ValueError(f"window {text!r} is not a number of latent frames; use 9 or all")
    return int(text)


def _sigmas(options: argparse.Namespace, preset: Preset) -> tuple[float, ...] | None:
    """Return the noise levels the options ask for; None for the preset's own."""
    shift = either(options.shift, preset.shift)
    if options.sigmas and options.sampling_steps is not None:
        raise ValueError("--sigmas and --sampling-steps were given; they exclude each other")
    if shift <= 0:
        raise ValueError(f"shift {shift:g} is not allowed; use a number above 0, Wan's is 5")
    if options.sigmas:
        return options.sigmas
    if options.sampling_steps is not None:
        return uniform_sigmas(options.sampling_steps, shift)
    return replace(preset, shift=shift).sigmas if options.shift is not None else None


def settings_of_preset(preset: Preset) -> SamplerSettings:
    return SamplerSettings(
        sigmas=preset.sigmas,
        first_sigmas=preset.first_sigmas if preset.first_timesteps else None,
        chunk=preset.chunk,
        solver=preset.solver,
        cfg=preset.cfg,
        span=preset.trained_span,
        policy=CachePolicy(sink=preset.sink, window=preset.window, positions=preset.positions),
        guidance=preset.guidance,
    )


def _guidance(
    options: argparse.Namespace, base: FutureGuidance | None, goals: bool
) -> FutureGuidance | None:
    if options.guidance == "off" and goals:
        raise ValueError(
            "goal pictures work through future guidance, which is off; use --guidance given"
        )
    if options.guidance == "off":
        return None
    given = {field: getattr(options, option) for option, field in GUIDANCE.items()}
    changes = {field: value for field, value in given.items() if value is not None}
    if options.keyframes is not None:
        changes |= _keyframes(options.keyframes)
    if base is None and options.guidance is None:
        if changes:
            raise ValueError(
                "future guidance is off for this model, so its options do nothing; add "
                "--guidance planned"
            )
        return FutureGuidance(mode="given") if goals else None
    return replace(base or FutureGuidance(), **changes)


def _keyframes(text: str) -> dict[str, object]:
    place, _, every = text.partition(":")
    if place != "every":
        return {"place": place}
    if not is_count(every):
        raise ValueError(f"keyframes {text!r} lacks its distance; write every:6")
    return {"place": place, "every": int(every)}
