"""`sneakpeek toyworld`: scenes as files that everything else reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sneakpeek_core.cli import main
from sneakpeek_core.mp4 import probe
from sneakpeek_core.schedule import parse_steps
from sneakpeek_core.toyworld.scene import FIRST_TRAINING_SEED, make_scene


def test_scenes_become_videos_steps_pictures_and_a_list(tmp_path: Path, capsys):
    """Each scene's video, its first picture, its steps in the schedule's format; and one list."""
    out, sheet = tmp_path / "set", tmp_path / "sheet.png"
    options = ["--seed", "5", "--count", "2", "--steps", "2", "--contact-sheet", str(sheet)]
    assert main(["toyworld", *options, "--out", str(out)]) == 0
    lines = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        scene = make_scene(5 + number, 2)
        facts = probe(out / line["video"])
        assert (facts.frames, facts.width, facts.height) == (49, 64, 64)
        assert [step["text"] for step in line["steps"]] == list(scene.sentences)
        assert [(step["start"], step["end"]) for step in line["steps"]] == [(0, 1.5), (1.5, 3)]
        texts = parse_steps((out / f"{number:05d}.txt").read_text())
        assert tuple(step.text for step in texts.steps) == scene.sentences
        assert Image.open(out / f"{number:05d}.png").size == (64, 64)
        assert f"scene {5 + number}: {scene.sentences[0]}" in capsys.readouterr().out or number
    with Image.open(sheet) as picture:
        assert picture.height > 4 * 192


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--count", "0"], "count 0"),
        (["--open-ended", "2"], "open-ended 2"),
        (["--objects", "7"], "objects 7"),
        (["--steps", "0"], "steps 0"),
        (["--contact-sheet", "sheet.jpg"], "sheet.jpg"),
    ],
)
def test_bad_options_are_refused(capsys, options: list[str], named: str):
    """In one line that names the number."""
    assert main(["toyworld", *options]) == 2
    assert named in capsys.readouterr().err


def test_a_data_set_is_not_written_over(tmp_path: Path, capsys):
    """A second run into the same folder is refused; its scenes are none that scores use."""
    run = ["toyworld", "--count", "1", "--steps", "1", "--out", str(tmp_path)]
    assert main(run) == 0 and main(run) == 2
    told = capsys.readouterr()
    assert f"scene {FIRST_TRAINING_SEED}:" in told.out
    assert "is not empty" in told.err
    assert main(run[:-2]) == 0 and "scene 0:" in capsys.readouterr().out
