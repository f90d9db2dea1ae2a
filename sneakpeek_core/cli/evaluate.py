"""`sneakpeek evaluate`: every claim about the method as a number that can be made again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import __version__
from ..assembly import Files, Parts, load_parts
from ..guidance import FutureGuidance
from ..model.fingerprint import weights_fingerprint
from ..records import settings_to_json
from ..settings import SamplerSettings
from ..toyworld.controls import (
    editable,
    edited_step,
    goal_images,
    open_ended,
    reconstructed,
    shuffled_texts,
)
from ..toyworld.evaluation import Evaluation, Grid, evaluate, settings_of
from ..toyworld.results import MODES, Comparison, Row, Rows, unguided_of
from ..toyworld.scene import TIERS
from ..whole_file import whole_file
from .options import device_of
from .sampling import settings_of_preset

COLUMNS = (
    ("steps", "steps", "d"), ("chunk", "chunk", "d"), ("guidance", "guidance", "s"),
    ("sampling_steps", "sampling", "d"), ("step_success", "success", ".3f"),
    ("step_success_se", "±", ".3f"), ("all_steps_right", "all right", ".3f"),
    ("persistence", "kept", ".3f"), ("shape", "shape", ".3f"),
    ("position_error_px", "error px", ".2f"), ("hand_path", "hand", ".3f"),
    ("psnr_db", "PSNR dB", ".2f"), ("psnr_drift_db", "drift dB", ".2f"),
    ("frame_passes", "passes", "d"), ("seconds", "s/video", ".2f"),
)  # fmt: skip


def add(commands) -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "evaluate", help="score videos of the toy world: guidance against none, paired"
    )
    command.set_defaults(run=run)
    add = command.add_argument
    add("--tier", choices=TIERS, default=TIERS[0])
    add("--steps", type=_counts, default=(8,), metavar="N,..", help="steps of a video")
    add("--chunk", type=_counts, default=(3,), metavar="N,..", help="latent frames of a chunk")
    add(
        "--guidance", type=lambda text: tuple(text.split(",")), default=("none", "predicted"),
        metavar="MODE,..", help=", ".join(MODES),
    )  # fmt: skip
    add("--sampling-steps", type=_counts, default=None, metavar="N,..", help="passes of a chunk")
    add("--videos", type=int, default=64, metavar="N")
    add("--seed", type=int, default=0, help="first scene, and the noise")
    add("--objects", type=int, default=3, metavar="N", help="2 to 5")
    add("--horizon", type=int, metavar="N", help="keyframes ahead (default: the model's)")
    add("--plan-passes", type=int, metavar="N", help="denoising passes of a plan")
    add("--window", type=int, metavar="N", help="newest latent frames attended to")
    add("--sink", type=int, metavar="N", help="first latent frames that stay visible")
    add(
        "--against",
        type=Path,
        metavar="JSON",
        help="compare with that evaluation's unguided rows, the own unguided ones too",
    )
    add(
        "--controls", action="store_true",
        help="the VAE, shuffled texts, a live edit, goal images as well",
    )  # fmt: skip
    add("--model", type=Path, help="transformer (default: the embedded one)")
    add("--vae", type=Path)
    add("--text-encoder", type=Path)
    add("--device", default="auto")
    add(
        "--json", type=Path, metavar="FILE", help="rows, comparisons, controls; grows with each row"
    )
    add("--plot", type=Path, metavar="PNG", help="success and PSNR over the steps of a video")


def run(options: argparse.Namespace) -> int:
    """Run the grid, print tables, write JSON and plot."""
    _check_files(options)
    files = Files.of(options.model, options.vae, options.text_encoder)
    parts = load_parts(files, device=device_of(options.device))
    settings = _settings(options, settings_of_preset(parts.preset))
    grid = Grid(
        tier=options.tier,
        steps=options.steps,
        chunks=options.chunk,
        modes=options.guidance,
        sampling_steps=options.sampling_steps or (len(settings.sigmas) - 1,),
        videos=options.videos,
        seed=options.seed,
        shift=parts.preset.shift,
        objects=options.objects,
    )
    plain = _unguided(options.against, grid) if options.against else None
    controls = _controls(parts, settings, grid) if options.controls else {}
    found = {"version": __version__, "options": _facts(parts, settings, grid)}

    def keep(**more: object) -> None:
        found.update(more)
        if options.json:
            with whole_file(options.json) as part:  # a kill leaves the rows so far
                part.write_text(json.dumps(found) + "\n", "utf-8")

    def done(result: Evaluation, row: Row) -> None:
        print(_line(row), flush=True)
        keep(**result.to_json())

    print("  ".join(f"{title:>9}" for _, title, _ in COLUMNS))
    result = evaluate(parts, settings, grid, done, plain)
    print(*map(_comparison_line, result.comparisons), sep="\n")
    measured: dict[str, object] = {}
    for name, control in controls.items():
        measured[name] = control()
        print(f"{name}: {json.dumps(measured[name])}", flush=True)
        keep(controls=measured)
    if options.plot:
        from ..toyworld.plots import plot_evaluation

        plot_evaluation(result, options.plot)
    return 0


def _controls(
    parts: Parts, settings: SamplerSettings, grid: Grid
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the controls by name, ready to run: at the grid's first chunk length and passes."""
    mode = "none" if settings.guidance is None else "predicted"
    cell = (3, grid.chunks[0], mode, grid.sampling_steps[0])
    own, scenes, pairs = settings_of(settings, grid, cell), grid.scenes(3), editable(grid)
    at = {"chunk": cell[1], "guidance": mode, "sampling_steps": cell[3]}
    return {
        "vae": lambda: asdict(reconstructed(parts, scenes)),
        "shuffled_texts": lambda: at | asdict(shuffled_texts(parts, own, scenes)),
        "edited_step": lambda: at | asdict(edited_step(parts, own, pairs)),
        "goal_images": lambda: at | asdict(goal_images(parts, own, open_ended(grid))),
    }


def _facts(parts: Parts, settings: SamplerSettings, grid: Grid) -> dict[str, Any]:
    """Return everything that the numbers depend on."""
    vae = weights_fingerprint(parts.vae.state_dict())
    return (
        {"weights": parts.model.fingerprint, "vae": vae}
        | asdict(grid)
        | {"settings": settings_to_json(settings)}
    )


def _unguided(path: Path, grid: Grid) -> Rows:
    try:
        return unguided_of(json.loads(path.read_text("utf-8")), grid.drawn_from)
    except (OSError, ValueError) as error:
        raise ValueError(f"--against {path}: {error}") from error


def _settings(options: argparse.Namespace, settings: SamplerSettings) -> SamplerSettings:
    guidance, policy = settings.guidance, settings.policy
    changes = {"count": options.horizon, "plan_passes": options.plan_passes}
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes:
        guidance = replace(guidance or FutureGuidance(), **changes)
    if options.window is not None:
        policy = replace(policy, window=options.window)
    if options.sink is not None:
        policy = replace(policy, sink=options.sink)
    return replace(settings, guidance=guidance, policy=policy, seeds=(options.seed,))


def _check_files(options: argparse.Namespace) -> None:
    for path in (options.json, options.plot):
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise ValueError(f"folder {path.parent} does not exist; make it first")
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file")
    if options.json and options.against and options.json.absolute() == options.against.absolute():
        raise ValueError(f"--json {options.json} would replace what --against reads; name another")
    if options.plot and find_spec("matplotlib") is None:
        raise ValueError('--plot needs matplotlib; install it with: pip install "sneakpeek[train]"')


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers; write 3,8")
    return counts


def _line(row: Row) -> str:
    return "  ".join(f"{getattr(row, name):>9{form}}" for name, _, form in COLUMNS)


def _comparison_line(one: Comparison) -> str:
    differences = ", ".join(
        f"{name} {mean:+.3f} ± {error:.3f}" for name, (mean, error) in one.differences.items()
    )
    guided = f"{one.guidance} ({one.sampling_steps} sampling steps, {one.frame_passes} passes)"
    plain = f"none ({one.none_sampling_steps}, {one.none_frame_passes})"
    gain, error = one.differences["step_success"]
    verdict = "gains" if gain > 2 * error else "loses" if gain < -2 * error else "no difference"
    return (
        f"{one.steps} steps, chunk {one.chunk}: {guided} - {plain}, {one.at}: {verdict}, "
        f"better in {one.better} videos and worse in {one.worse}; {differences}"
    )
