"""The command line that looks and does not make: `inspect` and `estimate`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sneakpeek_core.cli import estimate as estimate_command
from sneakpeek_core.cli import main
from sneakpeek_core.cli.jobs import fresh
from sneakpeek_core.cli.options import parser
from sneakpeek_core.cli.order import order_of
from sneakpeek_core.estimate import estimate
from tests.command_line import (
    PICTURE,
    SIZE,
    Bench,
    Capture,
    Patch,
    Shelf,
    at_chunk,
    edited_at,
    failing,
    failing_loader,
)


def inspected(path: object, capsys: Capture) -> str:
    capsys.readouterr()
    assert main(["inspect", str(path)]) == 0
    return capsys.readouterr().out


def test_inspect_describes_what_a_stopped_video_leaves(bench: Bench, capsys: Capture) -> None:
    """Journal, cache and video say how far they are and how to go on; the commands work."""
    with pytest.MonkeyPatch.context() as patch:
        at_chunk(patch, 3, failing(MemoryError()))
        assert bench.long("a.mp4", "--save-cache", "a.cache", "--seed", "5") == 1
    journal = inspected("a.mp4.journal", capsys)
    assert "journal: of a.mp4" in journal and "32x32, 16 frames/s" in journal
    assert "21 frames, 1.31 s in 3 chunks" in journal and "[1s] put it down" in journal
    assert "1.75 s, from step 2" in journal and re.search(r"edits +0", journal)
    assert "seed 5" in journal and "sneakpeek generate --resume a.mp4" in journal
    cache = inspected("a.cache", capsys)
    assert "cache: the state" in cache and "21 frames" in cache and "32x32" in cache
    assert "window 6, sink 1, positions relative" in cache and "1.75 s, from step 2" in cache
    film = inspected("a.mp4", capsys)
    assert "32x32, 16 frames/s, h264, 21 frames" in film and "lies beside it" in film
    assert main(shlex.split(film.split("go on with")[1])[1:]) == 0
    finished = inspected("a.mp4", capsys)
    assert "49 frames" in finished and "lies beside it" not in finished
    assert "[1s] put it down" in finished and "seed 5" in finished
    assert "nothing: all steps are made" in inspected("a.cache", capsys)


def test_inspect_shows_edits_and_no_control_characters(bench: Bench, capsys: Capture) -> None:
    """Edits are counted; texts cannot reach the terminal's controls."""
    steps = bench.write("odd.txt", "[1s] lift \x1b[2J it\n[2s] put it down\n")
    with pytest.MonkeyPatch.context() as patch:
        edited_at(patch, 2, steps, "[1s] lift \x1b[2J it\n[1s] drop it\n")
        at_chunk(patch, 4, failing(MemoryError()))
        assert bench.generate("--steps", steps, "--out", "a.mp4", "--watch") == 1
    told = inspected("a.mp4.journal", capsys)
    assert re.search(r"edits +1", told) and "drop it" in told and "\x1b" not in told


def test_inspect_says_how_weights_are_run(shelf: Shelf, capsys: Capture) -> None:
    """A transformer names its family, a VAE and a text encoder their part."""
    assert "tiny (by the file's metadata)" in (model := inspected(shelf.model, capsys))
    assert "streams     yes" in model and "width 128, 2 layers" in model
    assert "vae: a Wan 2.1 VAE" in inspected(shelf.vae, capsys)
    assert "text encoder" in inspected(shelf.text_encoder, capsys)


ESTIMATED = {
    "plain": [],
    "cfg": ["--cfg", "3", "--negative", "blurry"],
    "all kept": ["--window", "all", "--positions", "absolute", "--horizon", "1"],
    "no guidance": ["--guidance", "off", "--sink", "0", "--window", "4"],
    "image": ["--guidance", "off", "--sink", "0", "--window", "4", "--image", str(PICTURE)],
    "wide": ["--size", "64x32", "--keyframes", "every:2", "--horizon", "4", "--dtype", "bf16"],
}


@pytest.mark.parametrize("name", ESTIMATED)
def test_the_estimated_cache_is_the_cache(bench: Bench, name: str) -> None:
    """For the same options the bytes of both regions are those that are allocated."""
    options = [*bench.shelf.options, *SIZE, "--steps", "long.txt", *ESTIMATED[name]]
    arguments = parser().parse_args(["generate", *options])
    made = estimate(order_of(arguments).plan)
    stream = fresh(arguments).stream
    stream.chunk(1)
    assert stream.rollout is not None
    held = [t for c in stream.rollout.caches for t in (c.keys, c.rotated, c.values)]
    stream.close()
    assert made.past + made.future == sum(t.untyped_storage().nbytes() for t in held)
    assert (made.future > 0) == (stream.settings.keyframes > 0)


def test_an_estimate_that_does_not_fit_says_what_to_change(
    bench: Bench, monkeypatch: Patch, capsys: Capture
) -> None:
    """The verdict follows the free memory, and every piece of advice is an option that helps."""
    command = ["estimate", *bench.shelf.options, "--steps", "long.txt", "--size", "256x256"]
    command += ["--out", "a.mp4", "--cfg", "3", "--negative", "blurry", "--window", "8"]
    assert main(command) == 0
    fits = capsys.readouterr().out
    assert "256x256, 49 frames, tiny, float32 on" in fits and "GiB: it fits" in fits
    monkeypatch.setattr(estimate_command.sizes, "free_bytes", lambda device: 2**20)
    assert main(command) == 0
    lacks = capsys.readouterr().out
    assert "it does not fit" in lacks and not Path("a.mp4").exists()
    advice = [shlex.split(a)[:2] for a in re.findall(r"(--[\w-]+ \S+)", lacks)]
    assert [option for option, _ in advice] == ["--dtype", "--window", "--cfg", "--size"]
    plan = order_of(parser().parse_args(command)).plan
    for option in advice:
        without = command[:-4] if option[0] == "--cfg" else command
        without = without[: command.index("--cfg")] if option[0] == "--cfg" else without
        better = order_of(parser().parse_args([*without, *option])).plan
        assert estimate(better).total < estimate(plan).total, option


def test_a_cache_beyond_the_memory_is_refused_before_loading(
    bench: Bench, monkeypatch: Patch, capsys: Capture
) -> None:
    """Its size is known beforehand, so nothing is loaded to find out."""
    monkeypatch.setattr("sneakpeek_core.cli.jobs.free_bytes", lambda device: 2**20)
    monkeypatch.setattr("sneakpeek_core.cli.jobs.load_parts", failing_loader)
    assert bench.long("a.mp4", "--size", "512x512") == 2
    assert "of memory are free; to make it fit, " in capsys.readouterr().err
