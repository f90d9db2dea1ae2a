"""The command line from end to end, on tiny real files: what it makes of steps and options."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from sneakpeek_core import video
from sneakpeek_core.assembly import EMBEDDED
from sneakpeek_core.cli import main
from sneakpeek_core.cli.jobs import fresh, journal_of
from sneakpeek_core.cli.options import parser
from sneakpeek_core.frozen import FrozenCache
from sneakpeek_core.model.initial import random_transformer
from sneakpeek_core.mp4 import probe
from sneakpeek_core.schedule import parse_steps
from tests.command_line import (
    LONG,
    PICTURE,
    SIZE,
    STEPS,
    Bench,
    Capture,
    Shelf,
    at_chunk,
    facts_of,
    failing,
    frames_of_file,
    generate,
)
from tests.small import CONFIG, needs_tiny


def test_steps_an_image_and_a_goal_become_a_video(bench: Bench, capsys: Capture) -> None:
    """Everything asked for is there: video, facts in its tag, contact sheet, cache, progress."""
    code = bench.generate(
        "--steps", "steps.txt", "--image", PICTURE, "--goal", f"2={PICTURE}", "--seed", 7,
        "--out", "a.mp4", "--save-cache", "a.cache", "--contact-sheet", "a.png",
    )  # fmt: skip
    printed = capsys.readouterr().err
    assert code == 0
    facts = probe(Path("a.mp4"))
    assert (facts.frames, facts.width, facts.height, facts.fps) == (17, 32, 32, 16)
    stated = facts_of(Path("a.mp4"))
    assert stated["settings"]["seeds"] == [7] and stated["settings"]["chunk"] == 2
    assert stated["steps"] == STEPS.strip() and stated["edits"] == []
    assert len(stated["weights"]) == 32 and stated["version"]
    frozen = FrozenCache.load("a.cache")
    assert frozen.frontier == 5 and frozen.fingerprint == stated["weights"]
    with Image.open("a.png") as sheet:
        assert sheet.format == "PNG" and sheet.height > 2 * 192
    lines = re.findall(r"chunk (\d)/(\d)  (\d+)/17 frames  [\d.]+ frames/s  \[\d/2\] (.*)", printed)
    assert [line[:3] for line in lines] == [("1", "3", "1"), ("2", "3", "9"), ("3", "3", "17")]
    assert lines[0][3] == "lift it" and lines[-1][3] == "put it down"
    assert not journal_of(Path("a.mp4")).exists()
    assert {p.name for p in bench.folder.iterdir()} == {
        "steps.txt", "more.txt", "long.txt", "a.mp4", "a.cache", "a.png",
    }  # fmt: skip


def test_start_image_and_goal_change_the_video(bench: Bench) -> None:
    """Neither is ignored."""
    runs = {"plain": [], "image": ["--image", PICTURE], "goal": ["--goal", f"1={PICTURE}"]}
    for name, options in runs.items():
        assert bench.generate("--steps", "steps.txt", "--out", f"{name}.mp4", *options) == 0
    made = [frames_of_file(Path(f"{name}.mp4")) for name in runs]
    assert len(made[0]) == len(made[1]) == len(made[2]) == 17
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_a_wrapped_torch_checkpoint_runs_by_its_familys_settings(bench: Bench) -> None:
    """`generator_ema` of a .pt file, FSDP names and all, with chunk 3 and nothing ever dropped."""
    tensors = random_transformer(CONFIG, 3).state_dict()
    named = {f"model._fsdp_wrapped_module.{name}": t.clone() for name, t in tensors.items()}
    zeros = {name: torch.zeros_like(t) for name, t in named.items()}
    torch.save({"generator": zeros, "generator_ema": named}, "self_forcing_dmd.pt")
    code = bench.generate(
        "--model", "self_forcing_dmd.pt", "--steps", "steps.txt", "--out", "a.mp4"
    )
    assert code == 0 and probe(Path("a.mp4")).frames == 17
    settings = facts_of(Path("a.mp4"))["settings"]
    assert (settings["chunk"], settings["policy"]["window"]) == (3, None)
    assert settings["guidance"] is None and settings["sigmas"][0] == 1.0
    assert len(settings["sigmas"]) == 5


@needs_tiny
def test_without_any_file_the_example_runs_on_the_tiny_model(bench: Bench) -> None:
    """`sneakpeek generate` alone makes out.mp4: the embedded steps, picture and weights."""
    assert main(["generate"]) == 0
    facts = facts_of(Path("out.mp4"))
    assert probe(Path("out.mp4")).frames == 97 and facts["settings"]["solver"] == "euler"
    example = parse_steps((EMBEDDED / "steps.txt").read_text())
    assert parse_steps(facts["steps"]) == example and len(example.steps) == 4


MODES = {
    "off": ["--guidance", "off"],
    "planned": ["--guidance", "planned"],
    "joint": ["--guidance", "joint", "--horizon", "1"],
    "given": ["--guidance", "given", "--goal", f"2={PICTURE}"],
    "every": ["--keyframes", "every:3", "--horizon", "3"],
    "passes": ["--plan-passes", "1", "--guided-passes", "1", "--refresh", "1"],
    "shown noisy": ["--keyframe-sigma", "0.2", "--strength", "0.5", "--context-sigma", "0.1"],
    "no strength": ["--strength", "0"],
    "absolute": ["--positions", "absolute", "--sink", "2", "--window", "4"],
    "all": ["--window", "all"],
    "cfg": ["--cfg", "3", "--negative", "blurry", "--solver", "renoise"],
    "levels": ["--sigmas", "1,0.5,0"],
    "shift": ["--sampling-steps", "3", "--shift", "8", "--fps", "8", "--chunk", "1"],
    "bf16": ["--dtype", "bf16"],
}


@pytest.fixture(scope="module")
def plain(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The frames without any option, to compare with."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "long.txt").write_text(LONG)
    steps = ["--steps", folder / "long.txt"]
    assert generate(*shelf.options, *SIZE, *steps, "--out", folder / "a.mp4") == 0
    return frames_of_file(folder / "a.mp4")


@pytest.mark.parametrize("mode", MODES)
def test_every_option_of_sampling_runs_and_matters(
    bench: Bench, plain: torch.Tensor, mode: str
) -> None:
    """Each mode gives a whole video; only the default gives what the default gives."""
    assert bench.long("a.mp4", *MODES[mode]) == 0
    made = frames_of_file(Path("a.mp4"))
    assert len(made) == (25 if mode == "shift" else 49)
    assert torch.equal(made, plain) == (mode == "planned")


@pytest.mark.parametrize("codec", video.available_codecs())
def test_every_codec_on_offer_makes_a_file(bench: Bench, codec: str) -> None:
    """The file plays whole in the codec asked for."""
    options = ("--size", "64x64", "--codec", codec, "--crf", "30")
    assert bench.generate("--steps", "steps.txt", "--out", "a.mp4", *options) == 0
    facts = probe(Path("a.mp4"))
    assert facts.frames == 17 and facts.codec == {"h265": "hevc"}.get(codec, codec)


def test_overwrite_replaces_only_with_a_video(bench: Bench) -> None:
    """An old file goes when the new one has its first chunk, not before."""
    old = bench.write("a.mp4", "old")
    with pytest.MonkeyPatch.context() as patch:
        at_chunk(patch, 0, failing(MemoryError()))
        assert bench.generate("--steps", "steps.txt", "--out", old, "--overwrite") == 1
    assert old.read_text() == "old" and not journal_of(old).exists()
    assert bench.generate("--steps", "steps.txt", "--out", old, "--overwrite") == 0
    assert probe(old).frames == 17


def test_steps_may_have_the_same_text(bench: Bench) -> None:
    """Doing a thing twice is two steps with one text."""
    twice = bench.write("twice.txt", "[0.5s] whisk\n[0.5s] whisk\n")
    options = ("--steps", twice, "--out", "a.mp4", "--save-cache", "a.cache")
    assert bench.generate(*options) == 0
    assert probe(Path("a.mp4")).frames == 17


def test_settings_reach_the_stream(bench: Bench) -> None:
    """What is given on the command line is what the stream runs with."""
    options = ["--steps", "long.txt", "--window", "4", "--sink", "2", "--refresh", "2"]
    arguments = parser().parse_args(["generate", *bench.shelf.options, *SIZE, *options])
    stream = fresh(arguments).stream
    stream.close()
    settings = stream.settings
    assert (settings.policy.window, settings.policy.sink) == (4, 2)
    assert settings.guidance is not None and settings.guidance.refresh == 2
    assert replace(settings.policy, window=6, sink=1).positions == "relative"


def test_help_names_every_option(capsys: Capture) -> None:
    """`--help` works for every command and ends well."""
    for command in ([], ["generate"], ["estimate"], ["inspect"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--help"])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith("usage: sneakpeek")
