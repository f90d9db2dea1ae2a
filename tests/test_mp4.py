"""The MP4 file itself: torn anywhere it still reads, closed it starts fast and bears its tags."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

from sneakpeek_core.mp4 import probe, remux_fast_start
from tests.moving_picture import decoded, moving, psnr, writer


def test_a_torn_file_keeps_its_whole_fragments(tmp_path: Path) -> None:
    """Cut anywhere in the last chunk, the file still reads and remuxes to all chunks before."""
    path, torn = tmp_path / "a.mp4", tmp_path / "torn.mp4"
    frames = moving(12)
    stream = writer(path)
    for chunk in frames[:8].split(4):
        stream.write(chunk)
    whole = path.stat().st_size
    stream.write(frames[8:])
    stream.abort()
    content = path.read_bytes()
    hidden = content[: whole + 4] + b"free" + content[whole + 8 :]
    for cut in [*range(whole, whole + 170), *range(whole + 170, len(content), 300)]:
        torn.write_bytes(hidden[:cut])  # what a killed write leaves
        with av.open(str(torn)) as container:  # as a player that knows nothing of this
            assert sum(packet.size > 0 for packet in container.demux(video=0)) == 8, cut
        for rest in (hidden, content):  # the second is what a cut copy of the file looks like
            torn.write_bytes(rest[:cut])
            assert probe(torn).frames == 8, cut
        if cut % 10 == 0:
            remux_fast_start(torn)
            assert probe(torn).frames == 8, cut
    remux_fast_start(torn)
    assert psnr(decoded(torn)[0], frames[:8]) > 35


def test_close_gives_a_fast_start_file_with_metadata(tmp_path: Path) -> None:
    """Non-ASCII and 200 kB tags survive; no packet is re-encoded; a second remux adds nothing."""
    path = tmp_path / "ünï 日本 %d.mp4"
    prompt = json.dumps(
        {"text": "crème brûlée 🍮 日本語", "pad": "x" * 200_000}, ensure_ascii=False
    )
    tags = {"prompt": prompt, "workflow": "{}", "sneakpeek": "é", "comment": "with; odd=chars\n#"}
    stream = writer(path)
    for chunk in moving(13).split([1, 6, 6]):
        stream.write(chunk)
    fragmented = decoded(path)[0]
    assert stream.close(tags) is True and stream.close() is False
    assert probe(path).metadata == tags
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat") and b"moof" not in content
    assert np.array_equal(decoded(path)[0], fragmented)
    remux_fast_start(path)
    assert path.read_bytes() == content
    remux_fast_start(path, {"sneakpeek": "new"})
    assert probe(path).metadata == tags | {"sneakpeek": "new"}


def test_probe_refuses_what_is_no_video(tmp_path: Path) -> None:
    """Missing, empty and other files get a ValueError with their name."""
    for name, content in (("a.mp4", b""), ("b.mp4", b"hello" * 100)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            probe(tmp_path / name)
    with pytest.raises(ValueError, match="is not a file"):
        probe(tmp_path / "c.mp4")
