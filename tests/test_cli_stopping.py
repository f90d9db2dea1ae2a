"""Runs of the command line that are stopped, killed or run into trouble, and go on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sneakpeek_core import video
from sneakpeek_core.cli import main
from sneakpeek_core.cli.jobs import journal_of
from sneakpeek_core.denoiser import Denoiser
from sneakpeek_core.frozen import FrozenCache
from sneakpeek_core.journal import Journal
from sneakpeek_core.model.initial import random_transformer, random_vae
from sneakpeek_core.model.weights import save_model
from sneakpeek_core.mp4 import probe
from sneakpeek_core.sampler import Rollout
from tests.command_line import (
    LONG,
    PICTURE,
    SIZE,
    STATED,
    Bench,
    Capture,
    Patch,
    at_chunk,
    command_in,
    contents,
    facts_of,
    failing,
    failing_loader,
    frames_of_file,
    same_video,
)
from tests.small import CONFIG

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
    call = Denoiser.__call__

    def spoil() -> None:
        patch.setattr(Denoiser, "__call__", lambda *args: call(*args) * float("nan"))

    at_chunk(patch, 2, spoil)


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
