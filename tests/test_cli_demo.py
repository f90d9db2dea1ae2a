"""`sneakpeek demo`: the shipped model streams a scene, and the score it prints is of that video."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from sneakpeek_core.cli import main
from sneakpeek_core.mp4 import probe
from sneakpeek_core.stream import VideoStream
from sneakpeek_core.toyworld.scene import make_scene
from sneakpeek_core.toyworld.score import score
from tests.command_line import frames_of_file
from tests.small import needs_tiny

pytestmark = needs_tiny


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_demo_follows_its_steps(folder: Path, capsys):
    """demo.mp4 and demo.png in the current folder; steps are followed, and it says which."""
    assert main(["demo"]) == 0
    printed = capsys.readouterr()
    scene = make_scene(0, 4)
    facts = probe(folder / "demo.mp4")
    assert (facts.frames, facts.fps) == (scene.frames, 16)
    lines = printed.out.splitlines()
    assert [line[7:] for line in lines[:4]] == list(scene.sentences)
    found = re.search(r"(\d) of 4 steps followed", printed.out)
    assert found and int(found[1]) == sum(line.startswith("done") for line in lines) >= 3
    assert printed.err.count("chunk ") == 9  # the start picture and eight chunks
    # The file is compressed: positions survive, though not every shape does.
    written = score(scene, frames_of_file(folder / "demo.mp4").float() / 255)
    assert abs(written.step_success * 4 - int(found[1])) <= 1
    with Image.open(folder / "demo.png") as picture:
        assert picture.width > 4 * 192 and picture.height > 4 * 192


def test_a_stopped_demo_leaves_a_video_that_plays(folder: Path, capsys, monkeypatch):
    """An error in mid-stream is one sentence, and what was made is kept."""
    made = VideoStream.chunk

    def failing(self: VideoStream, index: int):
        if index == 3:
            raise torch.OutOfMemoryError("no memory left")
        return made(self, index)

    monkeypatch.setattr(VideoStream, "chunk", failing)
    assert main(["demo"]) == 1
    assert "memory" in capsys.readouterr().err
    assert probe(folder / "demo.mp4").frames == 25


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--steps", "0"], "steps 0"), (["--out", "nowhere/a.mp4"], "nowhere")],
)
def test_bad_options_are_refused(folder: Path, capsys, options: list[str], named: str):
    """Before anything is made."""
    assert main(["demo", *options]) == 2
    assert named in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_an_existing_video_is_not_written_over(folder: Path, capsys):
    """Unless asked for."""
    (folder / "demo.mp4").write_bytes(b"mine")
    assert main(["demo"]) == 2
    assert (folder / "demo.mp4").read_bytes() == b"mine"
    assert "exists" in capsys.readouterr().err
