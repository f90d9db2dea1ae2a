"""What the command line understands, and options as the values the core works with."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NoReturn

import torch

from ..guidance import MODES
from ..policy import POLICIES, POSITIONS
from ..settings import SOLVERS
from ..shapes import check_size
from .sampling import GUIDANCE, either, is_count

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OUT, CODEC = Path("out.mp4"), "h264"
SMALL_SIZE, FULL_SIZE = (64, 64), (832, 480)
BIG_DIM = 1024
SAMPLING = (
    "size", "fps", "seed", "chunk", "sigmas", "sampling_steps", "shift", "solver", "cfg",
    "negative", "context_sigma", "window", "sink", "positions", "policy", "keyframes", *GUIDANCE,
)  # fmt: skip
BESIDE_RESUME = (*SAMPLING, "image", "goal", "out", "overwrite", "codec", "crf")
DEVICES = ("cpu", "cuda", "mps", "xpu")
MAX_SIDE = 8192  # pixels
MAX_FPS = 1000


class _Parser(argparse.ArgumentParser):
    """A parser that leaves the last word to `main`, as every other bad input does."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; `{self.prog} --help` lists what there is")


def parser() -> argparse.ArgumentParser:
    """Return the parser; every command sets `run`. It raises `ValueError` for bad options."""
    from .demo import add as add_demo
    from .estimate import run as run_estimate
    from .evaluate import add as add_evaluate
    from .generate import run as run_generate
    from .inspect import run as run_inspect
    from .toyworld import add as add_toyworld
    from .train import add as add_train

    top = _Parser(
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
    _add_output(estimate)
    _add_sampling(estimate)
    inspect = commands.add_parser("inspect", help="say what a file is and how it would be run")
    inspect.set_defaults(run=run_inspect)
    inspect.add_argument("file", type=Path, metavar="FILE")
    for add in (add_demo, add_evaluate, add_toyworld, add_train):
        add(commands)
    return top


def _add_files(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("files").add_argument
    add("--model", type=Path, help="causal Wan 2.1 transformer (none: the tiny one)")
    add("--vae", type=Path, help="Wan 2.1 VAE")
    add("--text-encoder", type=Path, help="UMT5 file or folder, or a tiny one of ours")
    add("--lora", type=Path, help="adapters of the model, merged into it")
    add("--steps", type=Path, help="one step a line: [4s] whisk the eggs (none: an example)")
    add("--image", type=Path, help="start image")
    add(
        "--goal", action="append", default=[], metavar="STEP=FILE",
        help="a picture of how a step ends; can be repeated",
    )  # fmt: skip


def _add_output(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("output").add_argument
    add("--out", type=Path, help=f"video file (default: {OUT})")
    add("--overwrite", action="store_true", help="replace an existing video file")
    add("--codec", help=f"h264, h265, vp9 or av1 (default: {CODEC})")
    add("--crf", type=_whole, help="quality, lower is better (default: the codec's)")
    add("--contact-sheet", type=Path, metavar="PNG", help="first, middle, last frame of each step")
    add("--save-cache", type=Path, metavar="FILE", help="save the cache at the end, to go on later")
    add("--continue-from", type=Path, metavar="FILE", help="go on from a saved cache")
    add("--resume", type=Path, metavar="MP4", help="go on with a video that was stopped")
    add("--watch", action="store_true", help="apply changes of the steps file while it runs")


def _add_sampling(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("sampling (default: what the model was made for)").add_argument
    add("--size", metavar="WxH", help="pixels, multiples of 16")
    add("--fps", type=_number, help="frames per second of the model")
    add("--seed", type=_whole, help="default: 0")
    add("--chunk", type=_whole, metavar="N", help="latent frames generated together")
    add("--sigmas", type=_numbers, metavar="A,B,..,0", help="noise levels, from 1 down to 0")
    add("--sampling-steps", type=_whole, metavar="N", help="evenly spaced noise levels instead")
    add("--shift", type=_number, help="moves evenly spaced noise levels towards noise")
    add("--solver", choices=SOLVERS)
    add("--cfg", type=_number, help="above 1: guidance by --negative, with a second cache")
    add("--negative", metavar="TEXT", help="what the video should not show (with --cfg)")
    add("--context-sigma", type=_number, help="noise level of the context pass")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("auto", *DTYPES), default="auto")
    add = command.add_argument_group("cache policy").add_argument
    add("--window", metavar="N|all", help="newest latent frames attended to, open chunk included")
    add("--sink", type=_whole, metavar="N", help="first latent frames that are never dropped")
    add("--positions", choices=tuple(POSITIONS))
    add("--policy", choices=tuple(POLICIES))
    add = command.add_argument_group("future guidance").add_argument
    add("--guidance", choices=("off", *MODES), help="how keyframes are made (default: by model)")
    add("--keyframes", metavar="step_end|every:N", help="where they lie")
    add("--horizon", type=_whole, metavar="N", help="keyframes ahead")
    add("--strength", type=_number, help="attention weight of keyframes; 0 is off")
    add("--plan-passes", type=_whole, metavar="N", help="denoising passes of a plan")
    add("--guided-passes", type=_whole, metavar="N", help="only the first N passes of a chunk")
    add("--keyframe-sigma", type=_number, help="noise left on predicted keyframes")
    add("--refresh", type=_whole, metavar="N", help="plan again every N chunks")


def refuse_with_resume(options: argparse.Namespace) -> None:
    """Raise `ValueError` for an option beside --resume that would do nothing there."""
    names = BESIDE_RESUME if options.watch else (*BESIDE_RESUME, "steps")
    for name in names:
        if getattr(options, name) not in (None, [], False):
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
    if not (is_count(width) and is_count(height)):
        raise ValueError(f"size {text[:40]!r} is not WIDTHxHEIGHT; write for example 832x480")
    if max(int(width), int(height)) > MAX_SIDE:
        raise ValueError(f"size {text} is beyond {MAX_SIDE} pixels a side; use for example 832x480")
    check_size(int(width), int(height))
    return int(width), int(height)


def fps_of(given: float | None, default: float) -> float:
    """Return the frame rate; `ValueError` for one that no video has."""
    fps = either(given, default)
    if not 0 < fps <= MAX_FPS:
        raise ValueError(f"fps {fps:g} is not above 0 and at most {MAX_FPS}; Wan's is 16")
    return fps


def goals_of(texts: list[str]) -> dict[int, Path]:
    """Return the picture of each goal by step number from STEP=FILE texts."""
    goals: dict[int, Path] = {}
    for text in texts:
        number, _, path = text.partition("=")
        if not is_count(number) or not path:
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
        if device.type in DEVICES:
            torch.empty(1, device=device)
            return device
        reason = None
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = error
    raise ValueError(f"device {name!r} is not to be had here; use auto or cpu") from reason


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from None


def _number(text: str) -> float:
    """Read a number; NaN and infinity are none, since comparisons would let them through."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number")
    return number


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(_number(part) for part in text.split(","))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; write for example 1,0.9,0.6,0") from None
