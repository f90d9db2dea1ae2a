"""A file takes its place when it is whole; until then what was there stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from sneakpeek_core.whole_file import whole_file


def test_the_new_file_takes_the_place_of_the_old(tmp_path: Path):
    """At the end of the block, not before."""
    path = tmp_path / "a.json"
    path.write_text("old", "utf-8")
    with whole_file(path) as part:
        part.write_text("new", "utf-8")
        assert path.read_text("utf-8") == "old"
    assert path.read_text("utf-8") == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_everything_as_it_was(tmp_path: Path):
    """Also an interrupt, and a file of which nothing was written yet."""
    path = tmp_path / "a.json"
    path.write_text("old", "utf-8")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as part:
        part.write_text("ne", "utf-8")
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="full"), whole_file(path):
        raise OSError("full")
    assert path.read_text("utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]
