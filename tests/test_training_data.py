"""Data sets: videos to latents on disk, whole or not at all, from the toy world or a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sneakpeek_core.cli import main
from sneakpeek_core.model.initial import random_vae
from sneakpeek_core.toyworld.render import render
from sneakpeek_core.toyworld.scene import FIRST_TRAINING_SEED, make_scene
from sneakpeek_core.training.clips import Clips
from sneakpeek_core.training.latent_set import Clip, LatentSet, encode_clips
from sneakpeek_core.training.sources import ToyData, source_of
from sneakpeek_core.training.video_folder import FolderData, read_steps_file
from sneakpeek_core.vae.streaming import encode_image, encode_video
from sneakpeek_core.vae.wan import WanVAE

TEXT_DIM = 8
ABOUT = {"vae": "random 0"}


def texts(sentences: list[str]) -> list[Tensor]:
    return [torch.full((len(text.split()), TEXT_DIM), float(len(text))) for text in sentences]


def clip(index: int) -> Clip:
    rng = torch.Generator().manual_seed(index)
    frames = torch.randint(256, (9, 16, 16, 3), generator=rng).to(torch.uint8)
    return Clip(frames, (("lift it", 1), (f"put it at {index % 2}", 1)))


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return random_vae(8, 0).eval().requires_grad_(False)


NAMES = ("a", "b", "c", "d", "e")


def encoded(vae: WanVAE, folder: Path, count: int = 5, **options) -> LatentSet:
    encode_clips(NAMES[:count], clip, vae, texts, folder, about=ABOUT, batch=2, **options)
    return LatentSet(folder, NAMES[:count])


def test_latents_are_what_the_vae_makes_of_each_video(vae: WanVAE, tmp_path: Path):
    """Each video as a whole, each step's last picture alone, each sentence's embedding."""
    videos = encoded(vae, tmp_path)
    assert len(videos) == 5
    for index in range(5):
        sample, original = videos[index], clip(index)
        frames = original.frames_FHWC[None].float() / 255
        expected = encode_video(vae, frames)[0]
        assert (sample.latents.float() - expected).abs().max() < 4e-3 * expected.abs().max()
        for number, frame in enumerate((4, 8)):
            alone = encode_image(vae, frames[:, frame])[0, :, 0]
            assert (sample.ends[number].float() - alone).abs().max() < 4e-3 * alone.abs().max()
        assert sample.steps == original.steps
        for sentence, _ in sample.steps:
            assert torch.equal(videos.text(sentence), texts([sentence])[0])


def test_encoding_goes_on_where_it_was_stopped(vae: WanVAE, tmp_path: Path):
    """A kill leaves whole files only; what is there is not encoded again."""

    def killed(groups):
        for number, group in enumerate(groups):
            if number == 1:
                raise KeyboardInterrupt
            yield group

    with pytest.raises(KeyboardInterrupt):
        encoded(vae, tmp_path, progress=killed)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("[a-e].safetensors")}
    assert len(before) == 2
    (tmp_path / "d.part").write_bytes(b"half")
    videos = encoded(vae, tmp_path)
    assert len(videos) == 5 and torch.equal(videos.text("lift it"), texts(["lift it"])[0])
    assert all(p.stat().st_mtime_ns == then for p, then in before.items())
    fresh = encoded(vae, tmp_path / "fresh")
    assert all(torch.equal(videos[i].latents, fresh[i].latents) for i in range(5))


def test_a_folder_made_by_another_vae_is_refused(vae: WanVAE, tmp_path: Path):
    """Latents of two VAEs never mix, and an empty folder is no data set."""
    encoded(vae, tmp_path, 1)
    with pytest.raises(ValueError, match="vae 'random 0', not 'other'"):
        encode_clips(NAMES, clip, vae, texts, tmp_path, about={"vae": "other"})
    with pytest.raises(ValueError, match="lacks the encoded video b"):
        LatentSet(tmp_path, NAMES)


def test_a_folder_made_by_another_text_encoder_is_refused(vae: WanVAE, tmp_path: Path):
    """Its sentences would mean something else; another device's rounding is no other encoder."""
    encoded(vae, tmp_path, 1)

    def encode(change: float) -> None:
        def other(sentences: list[str]) -> list[Tensor]:
            return [embeds * (1 + change) for embeds in texts(sentences)]

        encode_clips(NAMES[:1], clip, vae, other, tmp_path, about=ABOUT)

    encode(0.01)
    with pytest.raises(ValueError, match="made with another text encoder; choose another folder"):
        encode(0.5)


def test_large_sets_are_read_as_they_are_asked_for(
    vae: WanVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same samples, kept or read."""
    kept = encoded(vae, tmp_path, 3)
    monkeypatch.setattr("sneakpeek_core.training.latent_set.IN_MEMORY", 0)
    read = LatentSet(tmp_path, NAMES[:3])
    shutil.copy(tmp_path / "b.safetensors", tmp_path / "a.safetensors")
    assert torch.equal(read[0].latents, kept[1].latents)  # it was read just now


def test_clips_have_the_frames_of_their_steps():
    """Frames and latent frames of the steps must agree."""
    with pytest.raises(ValueError, match="8 frames are not the 9 of 3"):
        Clip(torch.zeros(8, 16, 16, 3, dtype=torch.uint8), (("a", 2),))


def test_toy_data_are_scenes_that_no_score_uses():
    """Training scenes start at a million; the sentences and the pixels are the scene's."""
    data = ToyData(videos=3, steps=2, open_ended=0.0)
    source = source_of(data)
    assert len(source.names) == len(set(source.names)) == 3
    made, scene = source.clip_at(2), make_scene(FIRST_TRAINING_SEED + 2, 2)
    assert made.steps == tuple((sentence, 6) for sentence in scene.sentences)
    assert (made.frames_FHWC.float() / 255 - render(scene)).abs().max() < 0.5 / 255 + 1e-6


def test_toy_data_may_begin_in_the_middle():
    """Where a long video's later steps begin: the end of its earlier ones is the first picture."""
    data = ToyData(videos=6, steps=2, open_ended=0.0, moved=2)
    begins = []
    for index in range(data.videos):
        made = data.clip(index)
        for moved in range(3):
            whole = make_scene(FIRST_TRAINING_SEED + index, moved + 2)
            first, last = ((render(whole) * 255).round().byte()[i] for i in (moved * 24, -1))
            if torch.equal(made.frames_FHWC[0], first) and torch.equal(made.frames_FHWC[-1], last):
                assert tuple(text for text, _ in made.steps) == whole.sentences[moved:]
                begins.append(moved)
    assert sorted(begins) == [0, 0, 1, 1, 2, 2]


# -- a folder of videos


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `sneakpeek toyworld --out` writes."""
    path = tmp_path_factory.mktemp("videos") / "set"
    assert main(["toyworld", "--count", "2", "--steps", "2", "--out", str(path)]) == 0
    return path


def folder_data(folder: Path, **changes) -> FolderData:
    fields = {"path": str(folder), "width": 64, "height": 64} | changes
    return FolderData(kind="folder", **fields)


def test_a_folder_gives_the_videos_it_lists(folder: Path):
    """Rendered, written, listed and read back: the same sentences, nearly the same pixels."""
    source = source_of(folder_data(folder))
    assert len(source.names) == 2
    for index in range(2):
        scene, made = make_scene(FIRST_TRAINING_SEED + index, 2), source.clip_at(index)
        assert made.steps == tuple((sentence, 6) for sentence in scene.sentences)
        error = made.frames_FHWC.float() / 255 - render(scene)
        assert error.shape[0] == 49 and error.square().mean().sqrt() < 0.06


def test_frames_are_those_shown_at_their_times(folder: Path):
    """At half the rate every other frame, at another size the same picture scaled."""
    whole = source_of(folder_data(folder)).clip_at(0)
    slow = source_of(folder_data(folder, fps=8.0)).clip_at(0)
    assert [count for _, count in slow.steps] == [3, 3]
    assert torch.equal(slow.frames_FHWC, whole.frames_FHWC[::2])
    small = source_of(folder_data(folder, width=32, height=32)).clip_at(0)
    halved = whole.frames_FHWC.float().unflatten(1, (32, 2)).unflatten(3, (32, 2)).mean((2, 4))
    assert (small.frames_FHWC.float() - halved).abs().mean() < 6


def test_a_corrected_line_is_encoded_anew(folder: Path, tmp_path: Path):
    """A name follows file, text and times: other lines keep theirs, wherever they stand."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "steps.jsonl"
    first, second = path.read_text().splitlines()
    names = source_of(folder_data(tmp_path)).names
    path.write_text(f"{second}\n{first}\n")
    assert source_of(folder_data(tmp_path)).names == names[::-1]
    path.write_text(first.replace("the ", "a ") + f"\n{second}\n")
    changed = source_of(folder_data(tmp_path)).names
    assert changed[0] != names[0] and changed[1] == names[1]
    (tmp_path / "00001.mp4").touch()
    assert source_of(folder_data(tmp_path)).names[1] != names[1]


def test_pictures_that_lie_down_are_put_upright(folder: Path, tmp_path: Path):
    """A telephone's video: the track says to turn it by a quarter."""
    plain = listed(folder, tmp_path, ("a", 0.0, 1.0))
    whole = source_of(folder_data(plain)).clip_at(0).frames_FHWC
    video = tmp_path / "00000.mp4"
    one, zero, minus = b"\0\1\0\0", bytes(4), b"\xff\xff\0\0"
    upright = one + zero * 3 + one
    quarter = zero + one + zero + minus + zero  # clockwise, as players turn it
    track = video.read_bytes()
    at = track.index(upright, track.index(b"tkhd"))
    video.write_bytes(track[:at] + quarter + track[at + len(quarter) :])
    turned = source_of(folder_data(plain)).clip_at(0).frames_FHWC
    assert torch.equal(turned, whole.rot90(-1, (1, 2)))


def listed(folder: Path, tmp_path: Path, *steps: tuple[str, float, float], video="00000.mp4"):
    """A folder whose one video has other steps."""
    shutil.copy(folder / "00000.mp4", tmp_path / "00000.mp4")
    made = [{"text": text, "start": start, "end": end} for text, start, end in steps]
    line = json.dumps({"video": video, "steps": made})
    (tmp_path / "steps.jsonl").write_text(f"\n{line}\n")
    return tmp_path


def test_steps_may_begin_later(folder: Path, tmp_path: Path):
    """What lies before the first step and behind the last is left out."""
    path = listed(folder, tmp_path, ("b", 1.0, 2.0), ("c", 2.02, 2.5))
    made = source_of(folder_data(path)).clip_at(0)
    whole = source_of(folder_data(folder)).clip_at(0)
    assert made.steps == (("b", 4), ("c", 2))
    assert torch.equal(made.frames_FHWC, whole.frames_FHWC[16:41])


@pytest.mark.parametrize(
    ("steps", "named"),
    [
        ((("a", 0.0, 1.0), ("b", 1.5, 2.0)), "must follow each other"),
        ((("a", 1.0, 1.0),), "before it starts"),
        ((("", 0.0, 1.0),), "no text"),
        ((("a", -1.0, 1.0),), "start -1.0"),
        ((("a", 0.0, float("nan")),), "end nan"),
        ((), "no steps"),
    ],
)
def test_bad_lines_are_named(folder: Path, tmp_path: Path, steps: tuple, named: str):
    """The second line is wrong (the first is empty), and why."""
    path = listed(folder, tmp_path, *steps)
    with pytest.raises(ValueError, match=f"line 2: .*{named}"):
        read_steps_file(path)


def test_videos_that_cannot_be_are_refused(folder: Path, tmp_path: Path):
    """Outside the folder, missing, no video, too short: each in words."""
    step = ("a", 0.0, 1.0)
    for video, named in (("../00000.mp4", "outside"), ("gone.mp4", "does not exist")):
        with pytest.raises(ValueError, match=named):
            read_steps_file(listed(folder, tmp_path, step, video=video))
    long = source_of(folder_data(listed(folder, tmp_path, ("a", 0.0, 60.0))))
    with pytest.raises(ValueError, match="before its last step"):
        long.clip_at(0)
    path = listed(folder, tmp_path, step)
    (path / "00000.mp4").write_bytes(b"no video at all")
    with pytest.raises(ValueError, match="not a video"):
        source_of(folder_data(path)).clip_at(0)
    (path / "steps.jsonl").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        read_steps_file(path)


# -- cuts for the VAE


def test_cuts_are_mostly_where_something_is():
    """A square in a corner of a plain video is in most cuts; all are the size asked for."""
    videos = torch.full((2, 9, 64, 64, 3), 200, dtype=torch.uint8)
    videos[:, :, 2:10, 50:58] = torch.tensor((10, 200, 10), dtype=torch.uint8)
    rng = torch.Generator().manual_seed(0)
    cuts = Clips(videos).cut(rng, 40, 5, 32)
    assert cuts.shape == (40, 5, 32, 32, 3) and cuts.min() >= 0 and cuts.max() <= 1
    with_square = (cuts[..., 0] < 0.5).flatten(1).any(1).float().mean()
    assert 0.7 < with_square < 1
    again = Clips(videos).cut(torch.Generator().manual_seed(0), 40, 5, 32)
    assert torch.equal(cuts, again)


def test_cuts_can_be_where_something_moves():
    """Of a still square and one that moves, most cuts then hold the one that moves."""
    videos = torch.full((1, 9, 64, 64, 3), 200, dtype=torch.uint8)
    videos[:, :, 2:8, 2:8] = torch.tensor((10, 200, 10), dtype=torch.uint8)
    for frame in range(9):
        videos[:, frame, 50:56, 20 + frame : 26 + frame] = torch.tensor((200, 10, 10)).byte()
    shares = {}
    for on_motion in (0.0, 0.9):
        cuts = Clips(videos).cut(torch.Generator().manual_seed(0), 80, 5, 32, on_motion)
        shares[on_motion] = (cuts[..., 1] < 0.5).flatten(1).any(1).float().mean()
    assert shares[0.0] < 0.6 and shares[0.9] > 0.75


def test_cuts_can_be_where_a_strong_colour_moves():
    """Of a grey square and a red one that both move, most cuts then hold the red one."""
    videos = torch.full((1, 9, 64, 64, 3), 200, dtype=torch.uint8)
    for frame in range(9):
        videos[:, frame, 2:8, 10 + frame : 16 + frame] = 20
        videos[:, frame, 50:56, 20 + frame : 26 + frame] = torch.tensor((200, 10, 10)).byte()
    shares = {}
    for vivid in (False, True):
        cuts = Clips(videos).cut(
            torch.Generator().manual_seed(0), 80, 5, 32, on_motion=1.0, vivid=vivid
        )
        shares[vivid] = ((cuts[..., 0] - cuts[..., 1]) > 0.5).flatten(1).any(1).float().mean()
    assert shares[False] < 0.7 and shares[True] > 0.8


def test_cuts_come_from_all_over_a_video():
    """Starts and videos differ: frames are numbered by their brightness."""
    steps = torch.arange(9, dtype=torch.uint8).view(1, 9, 1, 1, 1) * 10
    videos = torch.cat([steps.expand(1, 9, 16, 16, 3), 100 + steps.expand(1, 9, 16, 16, 3)])
    rng = torch.Generator().manual_seed(0)
    cuts = (Clips(videos).cut(rng, 60, 5, 16)[:, :, 0, 0, 0] * 255).round()
    assert set(cuts[:, 0].int().tolist()) == {*range(0, 50, 10), *range(100, 150, 10)}
    assert np.all(np.diff(cuts.numpy(), axis=1) == 10)
