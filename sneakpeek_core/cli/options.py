"""What the command line understands, and options as the values the core works with."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from ..guidance import MODES, FutureGuidance
from ..model.presets import Preset
from ..policy import POLICIES, POSITIONS, CachePolicy
from ..settings import SOLVERS, SamplerSettings
from ..shapes import check_size
from ..sigmas import uniform_sigmas

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL_SIZE, FULL_SIZE = (64, 64), (832, 480)
BIG_DIM = 1024
# Guidance options and the fields of `FutureGuidance` they set.
_GUIDANCE = {
    "guidance": "mode",
    "horizon": "count",
    "strength": "strength",
    "plan_passes": "plan_passes",
    "guided_passes": "first_passes",
    "keyframe_sigma": "context_sigma",
    "refresh": "refresh",
}
SAMPLING = (
    "size", "fps", "seed", "chunk", "sigmas", "sampling_steps", "shift", "solver", "cfg",
    "negative", "context_sigma", "window", "sink", "positions", "policy", "keyframes", *_GUIDANCE,
)  # fmt: skip
Value = TypeVar("Value")


def parser() -> argparse.ArgumentParser:
    """Return the parser; every command sets `run`."""
    from .estimate import run as run_estimate
    from .generate import run as run_generate
    from .inspect import run as run_inspect

    top = argparse.ArgumentParser(
        prog="sneakpeek", description="Stream long, step-by-step videos from a list of steps."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="stream a video from a file of steps")
    generate.set_defaults(run=run_generate)
    _add_files(generate)
    _add_output(generate)
    _add_sampling(generate)
    estimate = commands.add_parser("estimate", help="say what memory a video will need")
    estimate.set_defaults(run=run_estimate)
    _add_files(estimate)
    _add_sampling(estimate)
    inspect = commands.add_parser("inspect", help="say what a file is and how it would be run")
    inspect.set_defaults(run=run_inspect)
    inspect.add_argument("file", type=Path, metavar="FILE")
    return top


def _add_files(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("files").add_argument
    add("--model", type=Path, help="causal Wan 2.1 transformer (none: small random weights)")
    add("--vae", type=Path, help="Wan 2.1 VAE")
    add("--text-encoder", type=Path, help="UMT5 file or folder, or a tiny one of ours")
    add("--steps", type=Path, help="one step a line: [4s] whisk the eggs (none: an example)")
    add("--image", type=Path, help="start image")
    add(
        "--goal", action="append", default=[], metavar="STEP=FILE",
        help="a picture of how a step ends; can be repeated",
    )  # fmt: skip


def _add_output(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("output").add_argument
    add("--out", type=Path, default=Path("out.mp4"), help="video file (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace an existing video file")
    add("--codec", default="h264", help="h264, h265, vp9 or av1 (default: %(default)s)")
    add("--crf", type=int, help="quality, lower is better (default: the codec's)")
    add("--contact-sheet", type=Path, metavar="PNG", help="first, middle, last frame of each step")
    add("--save-cache", type=Path, metavar="FILE", help="save the cache at the end, to go on later")
    add("--continue-from", type=Path, metavar="FILE", help="go on from a saved cache")
    add("--resume", type=Path, metavar="MP4", help="go on with a video that was stopped")
    add("--watch", action="store_true", help="apply changes of the steps file while it runs")


def _add_sampling(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("sampling (default: what the model was made for)").add_argument
    add("--size", metavar="WxH", help="pixels, multiples of 16")
    add("--fps", type=float, help="frames per second of the model")
    add("--seed", type=int, help="default: 0")
    add("--chunk", type=int, metavar="N", help="latent frames generated together")
    add("--sigmas", metavar="A,B,..,0", help="noise levels, from 1 down to 0")
    add("--sampling-steps", type=int, metavar="N", help="evenly spaced noise levels instead")
    add("--shift", type=float, help="moves evenly spaced noise levels towards noise")
    add("--solver", choices=SOLVERS)
    add("--cfg", type=float, help="above 1: guidance by --negative, with a second cache")
    add("--negative", metavar="TEXT", help="what the video should not show (with --cfg)")
    add("--context-sigma", type=float, help="noise level of the context pass")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("auto", *DTYPES), default="auto")
    add = command.add_argument_group("cache policy").add_argument
    add("--window", metavar="N|all", help="newest latent frames attended to, open chunk included")
    add("--sink", type=int, metavar="N", help="first latent frames that are never dropped")
    add("--positions", choices=tuple(POSITIONS))
    add("--policy", choices=tuple(POLICIES))
    add = command.add_argument_group("future guidance").add_argument
    add("--guidance", choices=("off", *MODES), help="how keyframes are made (default: by model)")
    add("--keyframes", metavar="step_end|every:N", help="where they lie")
    add("--horizon", type=int, metavar="N", help="keyframes ahead")
    add("--strength", type=float, help="attention weight of keyframes; 0 is off")
    add("--plan-passes", type=int, metavar="N", help="denoising passes of a plan")
    add("--guided-passes", type=int, metavar="N", help="only the first N passes of a chunk")
    add("--keyframe-sigma", type=float, help="noise left on predicted keyframes")
    add("--refresh", type=int, metavar="N", help="plan again every N chunks")


def settings_of(
    options: argparse.Namespace, preset: Preset, *, goals: bool, base: SamplerSettings | None = None
) -> SamplerSettings:
    """Return the preset's settings (or `base`, a cache's) with the options that were given on top.

    Raises `ValueError` in words.
    """
    base = base or _settings_of_preset(preset)
    window = base.policy.window if options.window is None else _window(options.window)
    sigmas = _sigmas(options, preset)
    return SamplerSettings(
        sigmas=sigmas or base.sigmas,
        first_sigmas=None if sigmas else base.first_sigmas,
        chunk=_either(options.chunk, base.chunk),
        solver=_either(options.solver, base.solver),
        cfg=_either(options.cfg, base.cfg),
        context_sigma=_either(options.context_sigma, base.context_sigma),
        span=base.span,
        seeds=base.seeds if options.seed is None else (options.seed,),
        policy=CachePolicy(
            sink=_either(options.sink, base.policy.sink),
            window=window,
            positions=_either(options.positions, base.policy.positions),
            policy=_either(options.policy, base.policy.policy),
        ),
        guidance=_guidance(options, base.guidance, goals),
    )


def refuse_with_resume(options: argparse.Namespace) -> None:
    """Raise `ValueError` for a sampling option beside --resume, where it would do nothing."""
    for name in SAMPLING:
        if getattr(options, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} does nothing beside --resume, which goes on with the video's own "
                "settings; leave it out, or start a new video"
            )


def size_of(text: str | None, default: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) in pixels from WxH; `ValueError` with the fix."""
    if text is None:
        return default
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"size {text!r} is not WIDTHxHEIGHT; write for example 832x480")
    check_size(int(width), int(height))
    return int(width), int(height)


def goals_of(texts: list[str]) -> dict[int, Path]:
    """Return the picture of each goal by step number from STEP=FILE texts."""
    goals: dict[int, Path] = {}
    for text in texts:
        number, _, path = text.partition("=")
        if not number.isdecimal() or not path:
            raise ValueError(f"goal {text!r} is not STEP=FILE; write for example 2=whisked.png")
        if int(number) in goals:
            raise ValueError(f"goal {text!r}: step {number} has a goal already; keep one")
        goals[int(number)] = Path(path)
    return goals


def device_of(name: str) -> torch.device:
    """Return the device; `ValueError` when this machine does not have it."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} is not to be had here; use auto or cpu") from error
    return device


def _either(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _numbers(name: str, text: str, kind: Callable[[str], Value]) -> tuple[Value, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} {text!r} is not a list of numbers; write 1,0.9,0.6,0") from None


def _window(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal():
        raise ValueError(f"window {text!r} is not a number of latent frames; use 9 or all")
    return int(text)


def _sigmas(options: argparse.Namespace, preset: Preset) -> tuple[float, ...] | None:
    """Return the noise levels the options ask for; None for the preset's own."""
    shift = _either(options.shift, preset.shift)
    if options.sigmas and options.sampling_steps is not None:
        raise ValueError("--sigmas and --sampling-steps were given; they exclude each other")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift {shift:g} is not allowed; use a number above 0, Wan's is 5")
    if options.sigmas:
        return _numbers("sigmas", options.sigmas, float)
    if options.sampling_steps is not None:
        return uniform_sigmas(options.sampling_steps, shift)
    return replace(preset, shift=shift).sigmas if options.shift is not None else None


def _settings_of_preset(preset: Preset) -> SamplerSettings:
    return SamplerSettings(
        sigmas=preset.sigmas,
        first_sigmas=preset.first_sigmas if preset.first_timesteps else None,
        chunk=preset.chunk,
        solver=preset.solver,
        cfg=preset.cfg,
        span=preset.trained_span,
        policy=CachePolicy(sink=preset.sink, window=preset.window, positions=preset.positions),
        # The known families were not trained to predict keyframes; our own models are.
        guidance=FutureGuidance() if preset.name == "tiny" else None,
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
    given = {field: getattr(options, option) for option, field in _GUIDANCE.items()}
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
    if not every.isdecimal():
        raise ValueError(f"keyframes {text!r} lacks its distance; write every:6")
    return {"place": place, "every": int(every)}
