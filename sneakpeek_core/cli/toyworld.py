"""`sneakpeek toyworld`: scenes of the toy world as videos, a data set, a contact sheet."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from PIL import Image

from ..contact_sheet import SheetRow, save_contact_sheet
from ..toyworld.render import render
from ..toyworld.scene import (
    FIRST_TRAINING_SEED,
    FPS,
    FRAMES_PER_STEP,
    SIZE,
    STEP_SECONDS,
    TIERS,
    Scene,
    make_scene,
)
from ..training.video_folder import STEPS_FILE
from ..video import VideoWriter, to_uint8


def add(commands) -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "toyworld", help="render scenes: videos with their steps, a contact sheet"
    )
    command.set_defaults(run=run)
    add = command.add_argument
    add(
        "--seed", type=int,
        help=f"of the first scene (default: 0; of a data set {FIRST_TRAINING_SEED}: lower ones are "
        "for `evaluate`)",
    )  # fmt: skip
    add("--count", type=int, default=8, metavar="N", help="scenes (default: 8)")
    add("--steps", type=int, default=3, metavar="N", help="of each scene (default: 3)")
    add("--tier", choices=TIERS, default=TIERS[0])
    add("--objects", type=int, default=3, metavar="N", help="2 to 5 (default: 3)")
    add(
        "--open-ended", type=float, default=0.0, metavar="SHARE",
        help="of steps that do not say where to (default: 0)",
    )  # fmt: skip
    add("--out", type=Path, metavar="FOLDER", help=f"videos, pictures, steps, {STEPS_FILE}")
    add("--contact-sheet", type=Path, metavar="PNG", help="start, middle and end of each step")


def run(options: argparse.Namespace) -> int:
    """Render, write what was asked for, print the steps."""
    if options.count < 1:
        raise ValueError(f"count {options.count} must be at least 1")
    if not 0 <= options.open_ended <= 1:
        raise ValueError(f"open-ended {options.open_ended:g} is a share; use 0 to 1")
    if options.out is not None and options.out.is_dir() and any(options.out.iterdir()):
        raise ValueError(f"{options.out} is not empty; choose another --out")
    first = options.seed
    if first is None:
        first = FIRST_TRAINING_SEED if options.out else 0
    scenes = [
        make_scene(
            seed, options.steps, tier=options.tier, objects=options.objects,
            open_ended=options.open_ended,
        )
        for seed in range(first, first + options.count)
    ]  # fmt: skip
    for scene in scenes:
        print(f"scene {scene.seed}: {'; '.join(scene.sentences)}")
    if options.contact_sheet:
        rows = [row for scene in scenes for row in _rows(scene)]
        save_contact_sheet(options.contact_sheet, rows)
        print(f"contact sheet: {options.contact_sheet}", file=sys.stderr)
    if options.out:
        _write(scenes, options.out)
        print(f"data set: {options.out / STEPS_FILE}", file=sys.stderr)
    return 0


def _rows(scene: Scene) -> list[SheetRow]:
    frames = render(scene)
    return [
        SheetRow(
            label=f"{scene.seed}.{number + 1} {sentence}",
            frames=[frames[FRAMES_PER_STEP * number + at] for at in (0, 9, 13, 17, 24)],
        )
        for number, sentence in enumerate(scene.sentences)
    ]


def _write(scenes: list[Scene], folder: Path) -> None:
    """Write every scene as video, start picture and steps, and the list of them all."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, scene in enumerate(scenes):
        frames = render(scene)
        name = f"{number:05d}"
        writer = VideoWriter(
            folder / f"{name}.mp4", width=SIZE, height=SIZE, fps=FPS, crf=8, overwrite=True
        )
        writer.write(frames)
        writer.close({})
        picture = to_uint8(frames[0]).numpy()
        Image.fromarray(picture).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(scene.steps_text, "utf-8")
        steps = [
            {"text": text, "start": STEP_SECONDS * i, "end": STEP_SECONDS * (i + 1)}
            for i, text in enumerate(scene.sentences)
        ]
        lines.append(json.dumps({"video": f"{name}.mp4", "steps": steps}) + "\n")
    (folder / STEPS_FILE).write_text("".join(lines), "utf-8")
