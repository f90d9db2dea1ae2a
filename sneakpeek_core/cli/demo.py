"""`sneakpeek demo`: a scene of the toy world streamed to a video, and how well it was followed."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from ..assembly import Files, encode_picture, load_parts
from ..conditioning import Conditioner
from ..contact_sheet import SheetRow, save_contact_sheet
from ..frames import FrameChunk, FrameCursor, Recorder
from ..schedule import parse_steps
from ..stream import VideoStream
from ..toyworld.render import render
from ..toyworld.scene import FRAMES_PER_STEP, SIZE, Scene, make_scene
from ..toyworld.score import score
from ..vae.streaming import StreamingDecoder
from ..video import VideoWriter
from .progress import Progress
from .sampling import settings_of_preset


def add(commands) -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "demo", help="stream a scene of the toy world, and score it against the truth"
    )
    command.set_defaults(run=run)
    command.add_argument("--seed", type=int, default=0, help="which scene (default: 0)")
    command.add_argument("--steps", type=int, default=4, metavar="N", help="default: 4")
    command.add_argument("--out", type=Path, default=Path("demo.mp4"), help="default: demo.mp4")
    command.add_argument("--overwrite", action="store_true", help="replace an existing video")


def run(options: argparse.Namespace) -> int:
    """Stream the scene, draw it beside the truth, print its score."""
    scene = make_scene(options.seed, options.steps)
    out: Path = options.out
    sheet = out.with_suffix(".png")
    for path in (out, sheet):
        if path.exists() and not options.overwrite:
            raise ValueError(f"{path} exists; choose another --out, or add --overwrite")
    device = torch.device("cpu")
    parts = load_parts(Files.of(), device=device)
    truth = render(scene)
    stream = VideoStream(
        parts.model,
        Conditioner(fps=parts.preset.fps, encode=parts.encode),
        parse_steps(scene.steps_text),
        settings_of_preset(parts.preset),
        width=SIZE,
        height=SIZE,
        start=encode_picture(parts.vae, truth[:1], (SIZE, SIZE)),
    )
    writer = VideoWriter(
        out, width=SIZE, height=SIZE, fps=parts.preset.fps, overwrite=options.overwrite
    )
    print(scene.steps_text, end="", file=sys.stderr)
    progress, made = Progress(stream), []

    def announce(chunk: FrameChunk) -> None:
        made.append(chunk.frames_BFHWC[0].cpu())
        progress.chunk(chunk)

    began = time.monotonic()
    recorder = Recorder(FrameCursor(stream, StreamingDecoder(parts.vae)), writer, announce)
    try:
        while recorder.step():
            pass
    except BaseException:
        writer.abort()  # what there is plays
        raise
    finally:
        progress.end()
        stream.close()
    seconds = time.monotonic() - began
    writer.close({})
    frames = torch.cat(made)
    save_contact_sheet(sheet, _beside_truth(scene, frames, truth))
    print(_report(scene, frames, seconds, out, sheet))
    return 0


def _beside_truth(scene: Scene, frames: torch.Tensor, truth: torch.Tensor) -> list[SheetRow]:
    rows = []
    for number, sentence in enumerate(scene.sentences):
        end = FRAMES_PER_STEP * (number + 1)
        middle = end - FRAMES_PER_STEP // 2
        pictures = [video[at] for video in (frames, truth) for at in (middle, end)]
        rows.append(SheetRow(label=f"{number + 1}. {sentence} (made | truth)", frames=pictures))
    return rows


def _report(scene: Scene, frames: torch.Tensor, seconds: float, out: Path, sheet: Path) -> str:
    scored = score(scene, frames)
    lines = [
        f"{'done' if step.success else 'MISSED':<7}{sentence}"
        for step, sentence in zip(scored.steps, scene.sentences, strict=True)
    ]
    right = sum(step.success for step in scored.steps)
    lines += [
        f"{right} of {len(scored.steps)} steps followed, objects kept {scored.persistence:.0%}, "
        f"shapes {scored.shape:.0%}, {scored.position_error_px:.1f} px from the truth",
        f"{len(frames)} frames in {seconds:.1f} s: {len(frames) / seconds:.0f} frames/s",
        f"video: {out}; beside the truth: {sheet}",
    ]
    return "\n".join(lines)
