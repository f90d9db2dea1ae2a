"""Law 5: a stream that is saved, or killed, goes on as if nothing had happened."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sneakpeek_core.conditioning import Conditioner
from sneakpeek_core.frames import FrameCursor, Recorder
from sneakpeek_core.frozen import WARM_LATENTS, FrozenCache
from sneakpeek_core.journal import read
from sneakpeek_core.model.initial import random_vae
from sneakpeek_core.policy import CachePolicy
from sneakpeek_core.recording import keep_journal, resume
from sneakpeek_core.schedule import Schedule
from sneakpeek_core.settings import SamplerSettings
from sneakpeek_core.shapes import frames_of
from sneakpeek_core.stream import VideoStream
from sneakpeek_core.vae.streaming import StreamingDecoder
from sneakpeek_core.video import VideoWriter
from tests.laws import FPS, LONG, continued, decodable_frames, small_stream, vae
from tests.small import JOINT, SIGMAS, SIZE, TEXT_DIM, goal, latents_of, model, settings, steps

ROOT = Path(__file__).parents[1]
SAVED_CASES = {
    "planned": settings(),
    "joint": settings(guidance=JOINT),
    "cfg": settings(cfg=3.0),
    "batch": settings(seeds=(3, 2**63 + 11)),
    "off, absolute": settings(guidance=None, policy=CachePolicy(sink=1, window=4)),
}
SAVED_AFTER = (1, 3, 5)  # chunks


def in_new_process(function: Callable[..., None], *arguments: object) -> subprocess.Popen[str]:
    """Start a function of this module in a fresh interpreter."""
    code = f"import sys; from tests.test_law5_continue import *; {function.__name__}(*sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def continue_all(folder: str) -> None:
    """Load every cache of a folder and go on to the end, without any text encoder."""
    for path in sorted(Path(folder).glob("*.cache")):
        frozen = FrozenCache.load(path)
        source = VideoStream.continue_from(frozen, model(), Conditioner(fps=FPS), frozen.settings)
        save_file({"latents": latents_of(source)}, path.with_suffix(".latents"))


def test_a_saved_cache_goes_on_in_a_new_process(tmp_path: Path):
    """Law 5: N+M chunks = N chunks, freeze, save, load in a new process, M chunks, bit for bit."""
    expected = {}
    for name, options in SAVED_CASES.items():
        whole = [chunk.latents_BCFHW for chunk in small_stream(options)]
        assert len(whole) == 7
        for chunks in SAVED_AFTER:
            source = small_stream(options)
            source.chunk(chunks - 1)
            key = f"{name} {chunks}"
            source.freeze().save(tmp_path / f"{key}.cache")
            expected[key] = torch.cat(whole[chunks:], dim=2)
    with in_new_process(continue_all, tmp_path) as child:
        pass
    assert child.returncode == 0
    for key, latents in expected.items():
        assert torch.equal(load_file(tmp_path / f"{key}.latents")["latents"], latents), key


@pytest.mark.parametrize("options", [settings(), settings(guidance=JOINT)], ids=["plan", "joint"])
def test_steps_that_share_an_embedding_go_on_sharing_it(tmp_path: Path, options: SamplerSettings):
    """Law 5 where steps share one tensor of their own: by cache, by file and by journal."""
    shared = torch.randn(1, 5, TEXT_DIM, generator=torch.Generator().manual_seed(1))
    one, two, three = steps("[1s] lift it", "[1s] turn it", "[1s] put it down").steps
    same_goal = goal(3)
    schedule = Schedule(
        (
            replace(one, embeds=shared, goal=same_goal), replace(two, embeds=shared),
            replace(three, embeds=shared, goal=same_goal),
        )
    )  # fmt: skip
    expected = latents_of(small_stream(options, schedule))
    source = small_stream(options, schedule)
    keep_journal(source, tmp_path / "x.journal")
    source.chunk(1)
    source.close()
    frozen = source.freeze()
    frozen.save(tmp_path / "x.cache")
    loaded = FrozenCache.load(tmp_path / "x.cache")
    for cache in (frozen, loaded):
        first, *others = cache.conditioning.texts
        assert all(text is first for text in others)
        assert cache.conditioning.goals[0] is cache.conditioning.goals[2] is not None
        assert torch.equal(latents_of(continued(cache)), expected[:, :, 3:])
    names = [name for name in load_file(tmp_path / "x.cache") if name.startswith(("text", "goal"))]
    assert sorted(names) == ["goal.0", "text.0"]
    again = resume(tmp_path / "x.journal", model(), Conditioner(fps=FPS))
    again.close()
    assert torch.equal(latents_of(again), expected)


def test_a_plan_outlives_the_freeze(tmp_path: Path):
    """Keyframes planned before a freeze are in force after it, and are not planned again."""
    source = small_stream()
    source.chunk(2)
    source.freeze().save(tmp_path / "x.cache")
    frozen = FrozenCache.load(tmp_path / "x.cache")
    assert [key.frame for key in frozen.future] == [6, 12] and frozen.planned_at == 1
    passes: list[int] = []
    after = continued(frozen)
    after.before_pass = lambda: passes.append(0)
    after.chunk(0)
    assert len(passes) == len(SIGMAS) - 1
    assert after.rollout is not None
    assert after.rollout.caches[0].future == frozen.future
    assert after.rollout.planned_at == 1


def record(folder: str, name: str, again: str = "", pause: str = "0") -> None:
    """Record a video with a journal beside it, announcing every chunk on stdout.

    `pause` is in seconds, after every chunk: it lets a signal arrive in time on a busy machine.
    """
    journal = Path(folder, "video.journal")
    if again:
        source = resume(journal, model(), Conditioner(fps=FPS))
    else:
        source = small_stream(schedule=steps(*LONG))
        keep_journal(source, journal)
    writer = VideoWriter(Path(folder, name), width=SIZE, height=SIZE, fps=FPS)
    recorder = Recorder(
        FrameCursor(source, StreamingDecoder(vae())), writer,
        lambda made: print(made.chunk.number, flush=True),
    )  # fmt: skip
    while recorder.step():
        time.sleep(float(pause))
    writer.close()
    save_file({"latents": latents_of(source)}, Path(folder, "latents"))


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_recording_plays_and_goes_on(tmp_path: Path):
    """Law 5, by journal: SIGKILL at any chunk leaves a video that plays up to the last announced
    one, and a fresh process, itself killed once, ends with the same latents."""
    expected = latents_of(small_stream(schedule=steps(*LONG)))
    rng = random.Random()
    at_least = 0
    for attempt, again in enumerate(("", "again")):
        last = rng.randrange(at_least + 1, at_least + 5)
        name = f"{attempt}.mp4"
        with in_new_process(record, tmp_path, name, again, 0.2) as child:
            assert child.stdout is not None
            announced = [int(child.stdout.readline()) for _ in range(last + 1)]
            child.send_signal(signal.SIGKILL)
            announced += [int(line) for line in child.stdout.read().splitlines()]
        assert child.returncode == -signal.SIGKILL, (attempt, last)
        assert announced == list(range(len(announced))), (attempt, last)
        assert decodable_frames(tmp_path / name) >= frames_of(1 + 2 * announced[-1])
        records = list(read(tmp_path / "video.journal"))
        assert len(records) >= 2 + announced[-1], "an announced chunk is not in the journal"
        at_least = announced[-1]
    with in_new_process(record, tmp_path, "2.mp4", "again") as child:
        assert child.stdout is not None
        assert len(child.stdout.readlines()) == 13
    assert child.returncode == 0
    assert torch.equal(load_file(tmp_path / "latents")["latents"], expected)
    assert decodable_frames(tmp_path / "2.mp4") == frames_of(25)
    assert len(list(read(tmp_path / "video.journal"))) == 1 + 13


def psnr(a: Tensor, b: Tensor) -> float:
    error = (a.double() - b.double()).pow(2).mean().item()
    return 10 * math.log10(1 / error) if error else math.inf


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seam_of_a_continued_video(seed: int):
    """A continued stream's first frames are those of the uninterrupted video, above 40 dB."""
    decoder_vae = random_vae(dim=8, seed=seed).eval()
    whole = small_stream(schedule=steps(*LONG))
    frames = StreamingDecoder(decoder_vae).decode(latents_of(whole))[0]
    before = small_stream(schedule=steps(*LONG))
    before.chunk(9)
    frozen = before.freeze()
    assert frozen.frontier == 19 > WARM_LATENTS == frozen.warm.shape[2]

    def seam(warm: Tensor) -> float:
        source = continued(replace(frozen, warm=warm))
        made = FrameCursor(source, StreamingDecoder(decoder_vae)).pull()
        assert made is not None and made.first == frames_of(19)
        return psnr(made.frames_BFHWC[0], frames[made.first : made.first + 8])

    assert seam(frozen.warm) > 40
    assert seam(frozen.warm[:, :, -1:]) < 30  # it is the warming that does it
