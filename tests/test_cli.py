"""The command line from end to end, on tiny real files: stream, stop, go on, look at it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from sneakpeek_core import video
from sneakpeek_core.cli import estimate as estimate_command
from sneakpeek_core.cli import main
from sneakpeek_core.cli.jobs import fresh, journal_of
from sneakpeek_core.cli.options import parser
from sneakpeek_core.cli.order import order_of
from sneakpeek_core.estimate import estimate
from sneakpeek_core.frozen import FrozenCache
from sneakpeek_core.journal import Journal
from sneakpeek_core.model.initial import random_transformer, random_vae
from sneakpeek_core.model.weights import save_model
from sneakpeek_core.mp4 import probe
from sneakpeek_core.sampler import Rollout
from sneakpeek_core.stream import VideoStream
from tests.command_line import (
    SIZE,
    STATED,
    STEPS,
    Shelf,
    contents,
    frames_of_file,
    generate,
    make_shelf,
)
from tests.small import CONFIG

PICTURE = Path(__file__).parent.parent / "sneakpeek_core/embedded/start.png"
MORE = "[0.5s] turn it around\n[0.5s] let it go\n"
LONG = "[1s] lift it\n[1s] turn it\n[1s] put it down\n"  # 13 latent frames, 7 chunks of 2
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Bench:
    """The working folder of a test, with a file of steps, beside a shelf of models."""

    folder: Path
    shelf: Shelf

    def write(self, name: str, text: str) -> Path:
        (self.folder / name).write_text(text)
        return self.folder / name

    def generate(self, *options: object) -> int:
        return generate(*self.shelf.options, *SIZE, *options)

    def long(self, out: str, *options: object) -> int:
        """Stream the long steps to `out`."""
        return self.generate("--steps", self.folder / "long.txt", "--out", out, *options)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return make_shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: Patch, shelf: Shelf) -> Bench:
    monkeypatch.chdir(tmp_path)
    made = Bench(tmp_path, shelf)
    for name, text in (("steps.txt", STEPS), ("more.txt", MORE), ("long.txt", LONG)):
        made.write(name, text)
    return made


def at_chunk(
    patch: Patch, number: int, act: Callable[[], torch.Tensor | None], times: int = 1
) -> None:
    """Let `act` run when chunk `number` of a stream is made; what it returns is the chunk."""
    make, left = Rollout.make, times

    def hooked(self: Rollout, conditioning):
        nonlocal left
        if self.chunk == number and left:
            left -= 1
            made = act()
            if made is not None:
                return made
        return make(self, conditioning)

    patch.setattr(Rollout, "make", hooked)


def failing(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def facts_of(path: Path) -> dict:
    return json.loads(probe(path).metadata["sneakpeek"])


def command_in(text: str) -> list[str]:
    """Return the arguments of the command that was printed to go on with."""
    program, *arguments = shlex.split(text.split("go on with: ")[1].splitlines()[0])
    assert program == "sneakpeek"
    return arguments


def same_video(one: Path, other: Path) -> bool:
    return torch.equal(frames_of_file(one), frames_of_file(other))


# -- one run ---------------------------------------------------------------------------------------


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


def test_without_any_file_the_example_runs_on_random_weights(bench: Bench, capsys: Capture) -> None:
    """`sneakpeek generate` alone makes out.mp4, and says that the picture is noise."""
    assert main(["generate", *SIZE, "--sampling-steps", "1"]) == 0
    assert "small random weights" in capsys.readouterr().err
    assert probe(Path("out.mp4")).frames == 97


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


# -- stopping and going on -------------------------------------------------------------------------

SLOW = """
    import sys, time
    from sneakpeek_core.cli import main
    from sneakpeek_core.sampler import Rollout
    make = Rollout.make
    def slow(self, conditioning):
        time.sleep(0.3)
        return make(self, conditioning)
    Rollout.make = slow
    sys.exit(main(sys.argv[1:]))
"""


def started(bench: Bench, *options: str) -> subprocess.Popen[str]:
    """Start a slow run in another process and wait until two chunks are on disk."""
    root = str(Path(__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW), "generate", *bench.shelf.options, *SIZE,
         *options],
        stderr=subprocess.PIPE, text=True, cwd=bench.folder,
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("chunk 2/"):
            return process
    raise AssertionError(f"it ended early, with {process.wait()}")


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_leaves_a_playable_file_and_the_command_to_go_on(bench: Bench) -> None:
    """Exit code 130; the printed command, run as it stands, ends in the uninterrupted video."""
    process = started(bench, "--steps", "long.txt", "--out", "it's.mp4", "--image", str(PICTURE))
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    stopped = Path("it's.mp4")
    frames = probe(stopped).frames
    assert 9 <= frames < 49 and journal_of(stopped).exists()
    assert f"{bench.folder}/it's.mp4 plays as it is" in printed
    assert "Traceback" not in printed

    root = str(Path(__file__).parent.parent)
    again = subprocess.run(
        [sys.executable, "-m", "sneakpeek_core.cli", *command_in(printed)],
        stderr=subprocess.PIPE, text=True, cwd="/", timeout=100,
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert bench.long("whole.mp4", "--image", PICTURE) == 0
    assert probe(stopped).frames == 49 and same_video(stopped, Path("whole.mp4"))
    assert facts_of(stopped) == facts_of(Path("whole.mp4"))
    assert not journal_of(stopped).exists()
    assert not list(bench.folder.glob("*stopped*"))


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_process_leaves_a_playable_file_to_resume(bench: Bench) -> None:
    """SIGKILL in the middle: what was announced plays, and resuming ends in the same video."""
    process = started(bench, "--steps", "long.txt", "--out", "a.mp4")
    process.kill()
    process.communicate(timeout=60)
    assert 13 <= probe(Path("a.mp4")).frames < 49
    assert main(["generate", "--resume", "a.mp4"]) == 0
    assert bench.long("whole.mp4") == 0
    assert same_video(Path("a.mp4"), Path("whole.mp4"))


def interrupting(times: int) -> Callable[[], None]:
    def act() -> None:
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)

    return act


def test_a_second_ctrl_c_ends_at_once(bench: Bench, monkeypatch: Patch, capsys: Capture) -> None:
    """No further pass is run, no cache is made, and the way to go on is still said."""
    at_chunk(monkeypatch, 2, interrupting(2))
    passes, run = [], Rollout._pass
    monkeypatch.setattr(Rollout, "_pass", lambda *a: (passes.append(a[0].chunk), run(*a))[1])
    assert bench.long("a.mp4", "--save-cache", "a.cache") == 130
    printed = capsys.readouterr().err
    assert 2 not in passes and not Path("a.cache").exists()
    monkeypatch.undo()
    os.chdir(bench.folder)
    assert probe(Path("a.mp4")).frames == 13
    assert main(command_in(printed)) == 0 and probe(Path("a.mp4")).frames == 49


def test_ctrl_c_while_the_model_loads_is_no_traceback(
    bench: Bench, monkeypatch: Patch, capsys: Capture
) -> None:
    """Before the stream begins there is nothing to keep: one line, exit code 130, no file."""
    monkeypatch.setattr("sneakpeek_core.cli.jobs.load_parts", failing_loader)
    before = contents(bench.folder)
    assert bench.long("a.mp4") == 130
    assert capsys.readouterr().err == "sneakpeek: stopped\n"
    assert contents(bench.folder) == before


def failing_loader(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_cache_saved_on_ctrl_c_goes_on_with_its_own_steps(
    bench: Bench, monkeypatch: Patch
) -> None:
    """Without --steps the steps that were left are made, from the next frame on."""
    at_chunk(monkeypatch, 3, interrupting(1))
    assert bench.long("a.mp4", "--save-cache", "a.cache") == 130
    made = probe(Path("a.mp4")).frames
    assert FrozenCache.load("a.cache").frontier == 1 + (made - 1) // 4
    monkeypatch.undo()
    os.chdir(bench.folder)
    assert bench.generate("--continue-from", "a.cache", "--out", "b.mp4") == 0
    assert bench.long("whole.mp4") == 0
    assert made + probe(Path("b.mp4")).frames == probe(Path("whole.mp4")).frames == 49
    assert facts_of(Path("b.mp4"))["steps"] == LONG.strip()


def test_more_steps_go_on_from_a_cache_and_can_be_stopped(
    bench: Bench, monkeypatch: Patch, capsys: Capture
) -> None:
    """--continue-from with --steps appends them; a stopped one resumes to the same video."""
    assert bench.generate(
        "--steps", "steps.txt", "--out", "a.mp4", "--save-cache", "a.cache", "--seed", 3
    ) == 0  # fmt: skip
    more = ("--continue-from", "a.cache", "--steps", "more.txt")
    assert bench.generate(*more, "--out", "whole.mp4", "--save-cache", "b.cache") == 0
    facts = facts_of(Path("whole.mp4"))
    assert probe(Path("whole.mp4")).frames == 16
    assert facts["steps"].splitlines()[-1] == "[0.5s] let it go"
    assert facts["settings"]["seeds"] == [3]
    assert FrozenCache.load("b.cache").frontier == 9

    capsys.readouterr()
    at_chunk(monkeypatch, 4, failing(OSError(28, "No space left on device")))
    assert bench.generate(*more, "--out", "b.mp4") == 1
    arguments = command_in(capsys.readouterr().err)
    assert 0 < probe(Path("b.mp4")).frames < 16
    assert main(arguments) == 0
    assert same_video(Path("b.mp4"), Path("whole.mp4"))


def test_a_resumed_run_is_stopped_and_resumed_again(bench: Bench) -> None:
    """Stopping twice loses nothing, and a replay that is cut short keeps the longer file."""
    with pytest.MonkeyPatch.context() as patch:
        at_chunk(patch, 4, failing(MemoryError()))
        assert bench.long("a.mp4") == 1
    kept = probe(Path("a.mp4")).frames
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video.VideoWriter, "write", failing_write(at=1))
        assert main(["generate", "--resume", "a.mp4"]) == 1
    assert probe(Path("a.mp4")).frames == kept
    with pytest.MonkeyPatch.context() as patch:
        at_chunk(patch, 5, failing(MemoryError()))
        assert main(["generate", "--resume", "a.mp4.journal"]) == 1
    assert probe(Path("a.mp4")).frames == kept + 8
    assert main(["generate", "--resume", "a.mp4"]) == 0 and bench.long("whole.mp4") == 0
    assert same_video(Path("a.mp4"), Path("whole.mp4"))


def failing_write(at: int) -> Callable[..., None]:
    write = video.VideoWriter.write

    def full(self: video.VideoWriter, frames: torch.Tensor) -> None:
        if self.chunks >= at:
            raise OSError(28, "No space left on device", str(self.path))
        write(self, frames)

    return full


# -- what goes wrong on the way --------------------------------------------------------------------


def full_writer(patch: Patch) -> None:
    patch.setattr(video.VideoWriter, "write", failing_write(at=2))


def full_journal(patch: Patch) -> None:
    append, left = Journal.append, 3

    def full(self: Journal, record) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        append(self, record)

    patch.setattr(Journal, "append", full)


def full_remux(patch: Patch) -> None:
    patch.setattr(video, "remux_fast_start", lambda *_: failing(OSError(28, "No space left"))())


def full_cache(patch: Patch) -> None:
    error = OSError(28, "No space left on device")
    patch.setattr(FrozenCache, "save", lambda *_: failing(error)())


def no_memory(patch: Patch) -> None:
    at_chunk(patch, 2, failing(MemoryError()))


def no_memory_for_torch(patch: Patch) -> None:
    text = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
    at_chunk(patch, 2, failing(RuntimeError(text)))


def not_a_number(patch: Patch) -> None:
    at_chunk(patch, 2, lambda: torch.full((1, 16, 2, 4, 4), float("nan")))


TROUBLE: dict[Callable[[Patch], None], str] = {
    full_writer: r"No space left on device; make room and go on",
    full_journal: r"No space left on device; make room and go on",
    full_remux: r"could not be finished; mend that and go on",
    full_cache: r"No space left on device; make room and go on",
    no_memory: r"out of memory; `sneakpeek estimate`",
    no_memory_for_torch: r"out of memory; `sneakpeek estimate`",
    not_a_number: r"NaN or infinity at 0\.75 s; .* another dtype",
}


@pytest.mark.parametrize("cause", TROUBLE, ids=lambda cause: cause.__name__)
def test_trouble_leaves_a_playable_file_and_a_way_to_go_on(
    bench: Bench, capsys: Capture, cause: Callable[[Patch], None]
) -> None:
    """Exit code 1, a sentence, what was announced plays; once it is mended the video is whole."""
    with pytest.MonkeyPatch.context() as patch:
        cause(patch)
        assert bench.long("a.mp4", "--save-cache", "a.cache") == 1
    printed = capsys.readouterr().err
    assert re.search(TROUBLE[cause], printed) and "Traceback" not in printed
    announced = [int(n) for n in re.findall(r"  (\d+)/49 frames", printed)]
    assert probe(Path("a.mp4")).frames == announced[-1] >= 13
    assert len(frames_of_file(Path("a.mp4"))) == announced[-1]
    assert not [p for p in bench.folder.iterdir() if p.name.endswith((".part", ".writing"))]
    assert main(command_in(printed)) == 0
    assert bench.long("whole.mp4") == 0
    assert same_video(Path("a.mp4"), Path("whole.mp4"))
    assert FrozenCache.load("a.cache").frontier == 13


def test_weights_that_are_nan_leave_nothing_behind(bench: Bench, capsys: Capture) -> None:
    """From the first chunk on there is nothing to keep: a sentence, no video, no journal."""
    tensors = random_transformer(CONFIG, 0).state_dict()
    tensors["head.head.bias"][0] = float("nan")
    save_model("nan.safetensors", tensors, {"sneakpeek": STATED})
    before = contents(bench.folder)
    assert bench.long("a.mp4", "--model", "nan.safetensors") == 1
    printed = capsys.readouterr().err
    assert "NaN or infinity at 0 s" in printed and "go on with:" not in printed
    assert contents(bench.folder) == before


def test_a_vae_that_is_nan_gets_a_sentence(bench: Bench, capsys: Capture) -> None:
    """The latents are kept, so the video can be finished with another VAE."""
    tensors = random_vae(8, 0).state_dict()
    tensors["decoder.head.2.bias"][:] = float("nan")
    save_model("nan.safetensors", tensors)
    assert bench.long("a.mp4", "--vae", "nan.safetensors") == 1
    printed = capsys.readouterr().err
    assert "a chunk holds NaN" in printed and not Path("a.mp4").exists()
    assert main([*command_in(printed), "--vae", str(bench.shelf.vae)]) == 0
    assert probe(Path("a.mp4")).frames == 49


def test_a_bug_is_not_dressed_up(bench: Bench, monkeypatch: Patch) -> None:
    """What nobody foresaw is a traceback, and still leaves a file and a journal."""
    at_chunk(monkeypatch, 2, failing(RuntimeError("shapes differ by the memory of a goldfish")))
    with pytest.raises(RuntimeError, match="goldfish"):
        bench.long("a.mp4")
    assert probe(Path("a.mp4")).frames == 13 and journal_of(Path("a.mp4")).exists()


def test_steps_may_have_the_same_text(bench: Bench) -> None:
    """Doing a thing twice is two steps with one text."""
    twice = bench.write("twice.txt", "[0.5s] whisk\n[0.5s] whisk\n")
    options = ("--steps", twice, "--out", "a.mp4", "--save-cache", "a.cache")
    assert bench.generate(*options) == 0
    assert probe(Path("a.mp4")).frames == 17


# -- live edits ------------------------------------------------------------------------------------


def edited_at(patch: Patch, chunk: int, path: Path, text: str) -> None:
    """Save `text` as the steps when `chunk` begins, and wait until the stream knows of it."""
    known, edit = threading.Event(), VideoStream.edit

    def noticed(self: VideoStream, schedule):
        made = edit(self, schedule)
        known.set()
        return made

    def act() -> None:
        path.write_text(text)
        assert known.wait(20), "the change was not noticed"

    patch.setattr(VideoStream, "edit", noticed)
    at_chunk(patch, chunk, act)


EDITED = "[1s] lift it\n[1s] juggle it\n[0.5s] drop it\n"


def test_a_watched_file_changes_coming_steps(
    bench: Bench, monkeypatch: Patch, capsys: Capture
) -> None:
    """Saving the file in mid-run edits the video from the next chunk on, and it is recorded."""
    edited_at(monkeypatch, 2, bench.folder / "long.txt", EDITED)
    assert bench.long("a.mp4", "--watch") == 0
    printed = capsys.readouterr().err
    facts = facts_of(Path("a.mp4"))
    assert probe(Path("a.mp4")).frames == 41
    assert facts["steps"] == EDITED.strip()
    assert [(e["latent_frame"], e["steps"]) for e in facts["edits"]] == [(6, EDITED.strip())]
    assert "juggle it" in printed and "edit landed: in effect from 1.25 s" in printed


def test_an_edit_survives_a_stop(bench: Bench, capsys: Capture) -> None:
    """A resumed video has the edits of the stopped one, and its file is watched again."""
    with pytest.MonkeyPatch.context() as patch:
        edited_at(patch, 2, bench.folder / "long.txt", EDITED)
        assert bench.long("whole.mp4", "--watch") == 0
    bench.write("long.txt", LONG)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        edited_at(patch, 2, bench.folder / "long.txt", EDITED)
        at_chunk(patch, 4, failing(MemoryError()))
        assert bench.long("a.mp4", "--watch") == 1
    assert main(command_in(capsys.readouterr().err)) == 0
    assert same_video(Path("a.mp4"), Path("whole.mp4"))
    assert facts_of(Path("a.mp4")) == facts_of(Path("whole.mp4"))


def test_a_watched_file_of_a_continued_video_holds_the_new_steps_only(
    bench: Bench, monkeypatch: Patch
) -> None:
    """The steps before the cache are not in the file, and stay."""
    assert bench.generate("--steps", "steps.txt", "--out", "a", "--out", "a.mp4",
                          "--save-cache", "a.cache") == 0  # fmt: skip
    edited_at(
        monkeypatch, 3, bench.folder / "more.txt", MORE.replace("[0.5s] let it go", "[1s] wave")
    )
    more = ("--continue-from", "a.cache", "--steps", "more.txt", "--watch")
    assert bench.generate(*more, "--out", "b.mp4") == 0
    assert probe(Path("b.mp4")).frames == 24
    assert facts_of(Path("b.mp4"))["steps"].splitlines()[-1] == "[1s] wave"


def test_a_bad_edit_is_told_and_changes_nothing(
    bench: Bench, monkeypatch: Patch, capsys: Capture
) -> None:
    """Nonsense in the watched file is refused with its line; the video goes on as it was."""
    seen, path = threading.Event(), bench.folder / "long.txt"
    monkeypatch.setattr("sneakpeek_core.cli.watch.on_one_line", lambda text: (seen.set(), text)[1])

    def act() -> None:
        path.write_text("[soon] what\x1b[2J\n")
        assert seen.wait(20), "nobody looked"

    at_chunk(monkeypatch, 2, act)
    assert bench.long("a.mp4", "--watch") == 0
    assert "edit not taken: steps " in (printed := capsys.readouterr().err)
    assert "line 1" in printed and probe(Path("a.mp4")).frames == 49
    assert facts_of(Path("a.mp4"))["edits"] == []


# -- looking ---------------------------------------------------------------------------------------


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


def test_help_names_every_option(capsys: Capture) -> None:
    """`--help` works for every command and ends well."""
    for command in ([], ["generate"], ["estimate"], ["inspect"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--help"])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith("usage: sneakpeek")


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
