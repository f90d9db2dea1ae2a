"""Bad options of every kind: one sentence with the fix, before sampling, nothing left behind."""

from __future__ import annotations

import os
import re
import struct
import zlib
from pathlib import Path

import pytest

from tests.bad_input import (
    Build,
    Row,
    file_named,
    folder_named,
    forbid_sampling,
    given,
    make_stocked_shelf,
    refused,
    stating,
    weights,
)
from tests.command_line import Shelf


def steps(content: str | bytes) -> Build:
    def build(folder: Path, shelf: Shelf) -> list[str]:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / "bad.txt").write_bytes(data)
        return ["--steps", "bad.txt"]

    return build


def picture(content: bytes, option: str = "--image") -> Build:
    def build(folder: Path, shelf: Shelf) -> list[str]:
        (folder / "bad.png").write_bytes(content)
        return [option, "bad.png" if option == "--image" else "1=bad.png"]

    return build


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises a size that its data does not hold."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT"


def truncated_png() -> bytes:
    path = Path(__file__).parent.parent / "sneakpeek_core/embedded/start.png"
    return path.read_bytes()[:-60]


def without(role: str) -> Build:
    def build(folder: Path, shelf: Shelf) -> list[str]:
        at = shelf.options.index(role)
        return shelf.options[:at] + shelf.options[at + 2 :]

    return build


def read_only(folder: Path, shelf: Shelf) -> list[str]:
    if os.name != "posix" or os.geteuid() == 0:
        pytest.skip("this user may write anywhere")
    (folder / "locked").mkdir(mode=0o555)
    return ["--out", "locked/a.mp4"]


LONG = "\n".join(f"[1s] step {i}" for i in range(1001))
TINY = "[1s] lift it\n"

SCHEDULES = [
    Row("empty steps", steps(""), r"bad\.txt: .*no steps", r"write one a line"),
    Row("only comments", steps("# a\n\n# b\n"), r"no steps", r"\[4s\] whisk"),
    Row("steps missing", given("--steps", "none.txt"), r"none\.txt", r"check the path"),
    Row("steps a folder", folder_named("d", "--steps", "d"), r"steps d ", r"check the path"),
    Row("binary steps", steps(b"\x89PNG\r\n\xff\xfe\x00"), r"bad\.txt is not text", r"UTF-8"),
    Row("UTF-16 steps", steps("[1s] a".encode("utf-16")), r"bad\.txt is not text", r"UTF-8"),
    Row("no duration", steps("lift it\n"), r"line 1: 'lift it' has no", r"\[4s\] whisk"),
    Row("control characters", steps("a\x1b[2Jb\n"), r"line 1", r"\[4s\] whisk"),
    Row("bad duration", steps(TINY + "[soon] lift\n"), r"line 2: .*soon", r"\[4s\] whisk"),
    Row("escape in a duration", steps("[\x1b[2J4] lift\n"), r"line 1: ", r"\[4s\] whisk"),
    Row("negative duration", steps("[-2s] lift\n"), r"\[-2s\]", r"\[4s\] whisk"),
    Row("no time", steps("[0s] lift\n"), r"0 seconds", r"more than 0"),
    Row("nan seconds", steps("[nan] lift\n"), r"\[nan\]", r"\[4s\] whisk"),
    Row("inf seconds", steps("[inf] lift\n"), r"\[inf\]", r"\[4s\] whisk"),
    Row("seconds beyond floats", steps(f"[{'9' * 400}s] lift\n"), r"inf seconds", r"more than 0"),
    Row("a thousand million s", steps("[1000000000s] lift\n"), r"1e\+09 s", r"at most 86400"),
    Row("1e9", steps("[1e9s] lift\n"), r"\[1e9s\]", r"\[4s\] whisk"),
    Row("open bracket", steps("[4s lift\n"), r"bracket in '\[4s lift'", r"\[4s\] whisk"),
    Row("no text", steps("[4s]\n"), r"line 1: .*no text", r"say what happens"),
    Row("two bases", steps("base: a\nbase: b\n" + TINY), r"line 2: a second base", r"keep one"),
    Row("empty base", steps("base:\n" + TINY), r"line 1: base: is empty", r"remove the line"),
    Row("text too long", steps(f"[4s] {'a' * 10_001}\n"), r"10001 characters", r"at most 10000"),
    Row("1001 steps", steps(LONG), r"1001 steps", r"split it"),
    Row("step too short", steps("[1s] a\n[0.01s] b\n"), r"step 2 lasts 0\.01", r"at least 0\.25 s"),
    Row("huge file", steps(b"#" * 50_000_001), r"bad\.txt: .*50 MB", r"split it"),
]
SIZES = [
    Row("size 0", given("--size", "0x0"), r"width 0", r"use 16"),
    Row("size 63", given("--size", "63x64"), r"width 63", r"use 64"),
    Row("size 64x65", given("--size", "64x65"), r"height 65", r"use 64"),
    Row("size abc", given("--size", "abc"), r"'abc'", r"832x480"),
    Row("size 64x", given("--size", "64x"), r"'64x'", r"832x480"),
    Row("size -64x64", given("--size=-64x64"), r"'-64x64'", r"832x480"),
    Row("size 1e9", given("--size", "1000000000x1000000000"), r"1000000000", r"832x480"),
    Row("size 1e8", given("--size", "160000000x16"), r"160000000x16 is beyond 8192", r"832x480"),
    Row("endless size", given("--size", f"{'1' * 5000}x16"), r"1111", r"832x480"),
]
PICTURES = [
    Row("image missing", given("--image", "no.png"), r"image no\.png", r"check the path"),
    Row("image no image", picture(b"hello"), r"image bad\.png", r"use a PNG"),
    Row("image empty", picture(b""), r"image bad\.png", r"use a PNG"),
    Row("image cut off", picture(truncated_png()), r"image bad\.png", r"use a PNG"),
    Row("image a folder", folder_named("d", "--image", "d"), r"image d is a folder", r"check the"),
    Row("bomb", picture(png(60000, 60000)), r"bad\.png has too many pixels", r"below 67 million"),
    Row("small bomb", picture(png(10000, 10000)), r"bad\.png has too many", r"below 67 million"),
    Row("goal for step 9", given("--goal", "9=a.png"), r"no step 9", r"use 1 to 2"),
    Row("goal for step 0", given("--goal", "0=a.png"), r"no step 0", r"use 1 to 2"),
    Row("goal malformed", given("--goal", "a.png"), r"'a\.png'", r"2=whisked\.png"),
    Row("goal empty", given("--goal", "1="), r"'1='", r"2=whisked\.png"),
    Row("goal twice", given("--goal", "1=a", "--goal", "1=b"), r"'1=b'", r"keep one"),
    Row("goal no image", picture(b"hello", "--goal"), r"goal 1 bad\.png", r"use a PNG"),
    Row(
        "goal without guidance",
        lambda folder, shelf: [
            *picture(_good_png(), "--goal")(folder, shelf), "--guidance", "off",
        ],
        r"guidance, which is off", r"--guidance given",
    ),
]  # fmt: skip


def _good_png() -> bytes:
    return (Path(__file__).parent.parent / "sneakpeek_core/embedded/start.png").read_bytes()


FLOATS = ("fps", "shift", "cfg", "context-sigma", "strength", "keyframe-sigma")
WHOLE = ("seed", "chunk", "sampling-steps", "sink", "horizon", "plan-passes", "guided-passes")
NUMBERS = [
    *(Row(f"{o} nan", given(f"--{o}", "nan"), rf"--{o}: 'nan'", r"not a number") for o in FLOATS),
    *(Row(f"{o} inf", given(f"--{o}=-inf"), rf"--{o}: '-inf'", r"not a number") for o in FLOATS),
    *(Row(f"{o} x", given(f"--{o}", "x"), rf"--{o}: 'x'", r"not a whole number") for o in WHOLE),
    Row("sigma nan", given("--sigmas", "1,nan,0"), r"--sigmas: 'nan'", r"write for example"),
    Row("sigmas words", given("--sigmas", "a,b"), r"--sigmas: 'a'", r"write for example"),
    Row("sigmas empty", given("--sigmas", ""), r"--sigmas: ''", r"write for example"),
    Row("sigmas without 0", given("--sigmas", "1,0.5"), r"\[1, 0\.5\]", r"end in 0; add it"),
    Row("sigmas rise", given("--sigmas", "0.5,1,0"), r"\[0\.5, 1, 0\]", r"sort them"),
    Row("sigmas above 1", given("--sigmas", "1.5,0"), r"\[1\.5, 0\]", r"from 1 at most"),
    Row("only 0", given("--sigmas", "0"), r"\[0\]", r"add it"),
    Row(
        "sigmas twice", given("--sigmas", "1,0", "--sampling-steps", "4"),
        r"--sigmas and --sampling-steps", r"exclude",
    ),
    Row("no passes", given("--sampling-steps", "0"), r"steps 0", r"1 to 1000"),
    Row("1001 passes", given("--sampling-steps", "1001"), r"steps 1001", r"1 to 1000"),
    Row("shift 0", given("--shift", "0"), r"shift 0", r"Wan's is 5"),
    Row("cfg 0.5", given("--cfg", "0.5"), r"cfg 0\.5", r"use 1"),
    Row("cfg 100", given("--cfg", "100"), r"cfg 100", r"to 30"),
    Row("cfg without negative", given("--cfg", "3"), r"cfg 3", r"--negative"),
    Row("negative without cfg", given("--negative", "bad"), r"--negative", r"--cfg 5"),
    Row("seed -1", given("--seed", "-1"), r"seed -1", r"use 0 to"),
    Row("seed 2^64", given("--seed", str(2**64)), r"seed 18446744073709551616", r"use 0 to"),
    Row("context sigma 1", given("--context-sigma", "1"), r"context sigma 1", r"0 up to 1"),
    Row("chunk 0", given("--chunk", "0"), r"chunk 0", r"1 to 64"),
    Row("chunk 1000", given("--chunk", "1000"), r"chunk 1000", r"1 to 64"),
    Row("fps 0", given("--fps", "0"), r"fps 0", r"at most 1000"),
    Row("fps -1", given("--fps", "-1"), r"fps -1", r"at most 1000"),
    Row("fps 1e6", given("--fps", "1e6"), r"fps 1e\+06", r"at most 1000"),
    Row("solver", given("--solver", "dpm"), r"--solver: .*'dpm'", r"choose from"),
    Row("dtype", given("--dtype", "int4"), r"--dtype: .*'int4'", r"choose from"),
    Row("device", given("--device", "toaster"), r"'toaster'", r"use auto or cpu"),
    Row("device without memory", given("--device", "meta"), r"'meta'", r"use auto or cpu"),
    Row("far device", given("--device", "cuda:99"), r"'cuda:99'", r"use auto or cpu"),
]  # fmt: skip
ABSOLUTE = ("--positions", "absolute")
POLICIES = [
    Row("window small", given("--chunk", "3", "--window", "2"), r"window 2", r"use 6 or more"),
    Row("window text", given("--window", "wide"), r"window 'wide'", r"use 9 or all"),
    Row("window negative", given("--window=-3"), r"window '-3'", r"use 9 or all"),
    Row("sink negative", given("--sink", "-1"), r"sink -1", r"use 0 or more"),
    Row("positions", given("--positions", "round"), r"'round'", r"choose from"),
    Row("policy", given("--policy", "lru"), r"'lru'", r"choose from"),
    Row("no room", given("--window", "18"), r"window 18 leave no room", r"window of 1\d or less"),
    Row(
        "too long for absolute",
        lambda folder, shelf: [*steps("[9s] a\n")(folder, shelf), *ABSOLUTE],
        r"37 latent frames .* go beyond", r"positions 'relative'",
    ),
    Row(
        "too long for all",
        lambda folder, shelf: [*steps("[9s] a\n")(folder, shelf), "--window", "all"],
        r"window all", r"window of 1\d or less",
    ),
    Row(
        "more than the memory", given("--size", "8192x8192", "--window", "17", "--sink", "0"),
        r"cache needs \d+\.\d GiB", r"to make it fit, .*--dtype bf16",
    ),
]  # fmt: skip
GUIDANCE = [
    Row("guidance", given("--guidance", "psychic"), r"'psychic'", r"choose from"),
    Row("strength -1", given("--strength", "-1"), r"strength -1", r"0 \(off\) to 4"),
    Row("strength 99", given("--strength", "99"), r"strength 99", r"0 \(off\) to 4"),
    Row("horizon 0", given("--horizon", "0"), r"horizon 0", r"1 to 8"),
    Row("horizon 99", given("--horizon", "99"), r"horizon 99", r"1 to 8"),
    Row("every what", given("--keyframes", "every"), r"'every'", r"every:6"),
    Row("every nothing", given("--keyframes", "every:"), r"'every:'", r"every:6"),
    Row("every 0", given("--keyframes", "every:0"), r"every 0", r"1 or more"),
    Row("place", given("--keyframes", "mars"), r"'mars'", r"step_end, every"),
    Row("refresh -1", given("--refresh", "-1"), r"refresh -1", r"use 0"),
    Row("no plan passes", given("--plan-passes", "0"), r"plan passes 0", r"use 1"),
    Row("no guided passes", given("--guided-passes", "0"), r"first passes 0", r"use 1"),
    Row("keyframe sigma", given("--keyframe-sigma", "1"), r"context sigma 1", r"below 1"),
    Row(
        "guidance that is off",
        lambda folder, shelf: [
            *weights("--model", stating(preset="self_forcing"))(folder, shelf), "--strength", "1",
        ],
        r"future guidance is off", r"--guidance planned",
    ),
]  # fmt: skip
OUTPUTS = [
    Row("codec", given("--codec", "mpeg1"), r"codec 'mpeg1'", r"available: h264"),
    Row("crf", given("--crf", "99"), r"crf 99", r"1\.\.51"),
    Row("av1 too small", given("--codec", "av1"), r"width 32", r"use 64"),
    Row("not mp4", given("--out", "a.avi"), r"a\.avi", r"use a\.mp4"),
    Row("no folder", given("--out", "none/a.mp4"), r"folder none", r"create it"),
    Row("out a folder", folder_named("d.mp4", "--out", "d.mp4"), r"d\.mp4", r"name of a file"),
    Row("out there", file_named("a.mp4", "--out", "a.mp4"), r"a\.mp4 exists", r"--overwrite"),
    Row("default out there", file_named("out.mp4"), r"out\.mp4 exists", r"--overwrite"),
    Row("read-only folder", read_only, r"locked", r"choose another"),
    Row("cache folder", given("--save-cache", "none/c"), r"--save-cache none", r"make the folder"),
    Row("cache a folder", folder_named("d", "--save-cache", "d"), r"--save-cache d", r"a file in"),
    Row("sheet folder", given("--contact-sheet", "none/a.png"), r"none", r"make the folder"),
    Row("sheet not png", given("--contact-sheet", "a.jpg"), r"a\.jpg", r"use a\.png"),
    Row("cache over video", given("--save-cache", "out.mp4"), r"out\.mp4 is --out", r"another"),
    Row(
        "cache over journal", given("--save-cache", "out.mp4.journal"),
        r"the journal of --out", r"another",
    ),
    Row(
        "sheet over cache", given("--save-cache", "a.png", "--contact-sheet", "a.png"),
        r"a\.png is --save-cache", r"another",
    ),
    Row("watching nothing", given("--watch"), r"--watch", r"give it with --steps", bare=True),
    Row("unknown option", given("--frobnicate"), r"--frobnicate", r"--help"),
    Row("no value", given("--seed"), r"--seed", r"--help"),
]  # fmt: skip


PARTS = [
    Row("model without vae", without("--vae"), r"--vae is missing", r"give both"),
    Row("vae without model", without("--model"), r"--model is missing", r"give both"),
    Row("no text encoder", without("--text-encoder"), r"--text-encoder is missing", r"give"),
]
SAMPLING = SCHEDULES + SIZES + PICTURES + NUMBERS + POLICIES + GUIDANCE
ROWS = SAMPLING + OUTPUTS + PARTS


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return make_stocked_shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(autouse=True)
def no_sampling(monkeypatch: pytest.MonkeyPatch, shelf: Shelf) -> None:
    forbid_sampling(monkeypatch)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_input_gets_one_sentence_with_the_fix(
    row: Row,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shelf: Shelf,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, one line that blames and advises, no sampling, every file as it was."""
    monkeypatch.chdir(tmp_path)
    line = refused("generate", row, tmp_path, shelf, capsys)
    assert re.search(row.blames, line), line
    assert re.search(row.fix, line), line


@pytest.mark.parametrize("row", SAMPLING + PARTS[:2], ids=lambda row: row.name)
def test_an_estimate_refuses_what_generate_refuses(
    row: Row,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shelf: Shelf,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`estimate` takes the options of `generate` and checks them alike (it may lack memory)."""
    if row.name == "more than the memory":
        pytest.skip("that is what an estimate is for")
    monkeypatch.chdir(tmp_path)
    line = refused("estimate", row, tmp_path, shelf, capsys)
    assert re.search(row.blames, line), line
