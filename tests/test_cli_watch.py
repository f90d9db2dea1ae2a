"""A file of steps that is watched: saving it edits the video that is being made."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from sneakpeek_core.cli import main
from sneakpeek_core.mp4 import probe
from tests.command_line import (
    LONG,
    MORE,
    Bench,
    Capture,
    Patch,
    at_chunk,
    command_in,
    edited_at,
    facts_of,
    failing,
    same_video,
)

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
