"""Bad input of every kind: one sentence with the fix, before any sampling, nothing left behind."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sneakpeek_core.cli import main
from sneakpeek_core.frozen import FrozenCache
from sneakpeek_core.journal import MAGIC, Journal, read
from sneakpeek_core.model.initial import random_transformer, random_vae
from sneakpeek_core.model.weights import save_model
from sneakpeek_core.sampler import Rollout
from sneakpeek_core.text_encoder import random_text_encoder, save_text_encoder
from tests.command_line import SIZE, STATED, STEPS, Shelf, contents, generate, make_shelf
from tests.small import CONFIG

Build = Callable[[Path, Shelf], list[str]]


@dataclass(frozen=True)
class Row:
    """A bad input: how it is made (the options come back), what is blamed, and the fix."""

    name: str
    build: Build
    blames: str  # a pattern: the offending name or value
    fix: str  # a pattern
    bare: bool = False  # without the default steps and size


def given(*options: str) -> Build:
    return lambda folder, shelf: list(options)


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


def folder_named(name: str, *options: str) -> Build:
    def build(folder: Path, shelf: Shelf) -> list[str]:
        (folder / name).mkdir()
        return list(options)

    return build


def file_named(name: str, *options: str, content: bytes = b"precious") -> Build:
    def build(folder: Path, shelf: Shelf) -> list[str]:
        (folder / name).write_bytes(content)
        return list(options)

    return build


def weights(role: str, make: Callable[[Path], object], name: str = "bad.safetensors") -> Build:
    """One of the three files is bad."""

    def build(folder: Path, shelf: Shelf) -> list[str]:
        make(folder / name)
        return [*shelf.options, role, name]

    return build


def as_bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def transformer(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """A file of the small model with something changed."""

    def make(path: Path) -> None:
        tensors = random_transformer(CONFIG, 0).state_dict()
        change(tensors)
        save_model(path, tensors, {"sneakpeek": STATED})

    return make


def patches(channels: int) -> Callable[[Path], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["patch_embedding.weight"] = torch.zeros(CONFIG.dim, channels, 1, 2, 2)
        if channels == 48:
            tensors["head.head.weight"] = torch.zeros(4 * 48, CONFIG.dim)

    return transformer(change)


def stating(**fields: object) -> Callable[[Path], object]:
    """A file of the small model whose metadata says something else."""
    tensors = random_transformer(CONFIG, 0).state_dict
    return lambda path: save_model(path, tensors(), {"sneakpeek": STATED | fields})


def cut(path: Path) -> None:
    transformer(lambda tensors: None)(path)
    os.truncate(path, path.stat().st_size - 1000)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def pickled(path: Path) -> None:
    torch.save({"a": Evil()}, path)


def lora(path: Path) -> None:
    save_file({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 128)}, path)


def narrow_encoder(path: Path) -> None:
    save_text_encoder(path, random_text_encoder(0, 48))


def without(role: str) -> Build:
    def build(folder: Path, shelf: Shelf) -> list[str]:
        at = shelf.options.index(role)
        return shelf.options[:at] + shelf.options[at + 2 :]

    return build


def swapped(role: str, name: str) -> Build:
    """One of the three files is given as another."""
    return lambda folder, shelf: [*shelf.options, role, str(shelf.folder / f"{name}.safetensors")]


def cache(*options: str) -> Build:
    """A good cache, continued in a way that does not fit it."""
    return lambda folder, shelf: [
        *shelf.options, "--continue-from", str(shelf.folder / "good.cache"), *options,
    ]  # fmt: skip


def bad_cache(change: Callable[[Path], object]) -> Build:
    def build(folder: Path, shelf: Shelf) -> list[str]:
        shutil.copy(shelf.folder / "good.cache", folder / "bad.cache")
        change(folder / "bad.cache")
        return [*shelf.options, "--continue-from", "bad.cache"]

    return build


def refrozen(**changes: Callable[[FrozenCache], object]) -> Build:
    def change(path: Path) -> None:
        frozen = FrozenCache.load(path)
        replace(frozen, **{name: make(frozen) for name, make in changes.items()}).save(path)

    return bad_cache(change)


def resumed(change: Callable[[Path], object], *options: str) -> Build:
    """The journal of a video that was stopped, with something wrong about it."""

    def build(folder: Path, shelf: Shelf) -> list[str]:
        shutil.copy(shelf.folder / "stopped.mp4.journal", folder / "a.mp4.journal")
        (folder / "a.mp4").write_bytes(b"plays")
        change(folder / "a.mp4.journal")
        return ["--resume", "a.mp4", *options]

    return build


def rewritten(**changes: object) -> Callable[[Path], object]:
    """Change the header of a journal's first record."""

    def change(path: Path) -> None:
        (start, *rest), _ = read(path)
        with Journal.create(path, start._replace(header=start.header | changes)) as journal:
            for record in rest:
                journal.append(record)

    return change


def read_only(folder: Path, shelf: Shelf) -> list[str]:
    if os.name != "posix" or os.geteuid() == 0:
        pytest.skip("this user may write anywhere")
    (folder / "locked").mkdir(mode=0o555)
    return ["--out", "locked/a.mp4"]


def nothing(path: Path) -> None:
    pass


def flip(path: Path) -> None:
    """Damage the first record: its checksum no longer holds."""
    data = bytearray(path.read_bytes())
    data[len(MAGIC) + 40] ^= 255
    path.write_bytes(data)


LONG = "\n".join(f"[1s] step {i}" for i in range(1001))
TINY = "[1s] lift it\n"
MORE = "[0.5s] turn it\n[0.5s] let it go\n"
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
WEIGHTS = [
    Row("model without vae", without("--vae"), r"--vae is missing", r"give both"),
    Row("vae without model", without("--model"), r"--model is missing", r"give both"),
    Row("no text encoder", without("--text-encoder"), r"--text-encoder is missing", r"give"),
    Row("model missing", given("--model", "no.pt", "--vae", "v"), r"no\.pt", r"check the path"),
    Row(
        "vae missing", lambda f, shelf: [*shelf.options, "--vae", "no.pth"],
        r"vae no\.pth", r"check the path",
    ),
    Row(
        "encoder missing", lambda f, shelf: [*shelf.options, "--text-encoder", "no"],
        r"text encoder no ", r"check the path",
    ),
    Row("model a folder", weights("--model", Path.mkdir), r"bad\.safetensors is a folder", r"name"),
    Row("vae as model", swapped("--model", "vae"), r"vae\.\w+ is a Wan 2\.1 VAE", r"as the VAE"),
    Row("model as vae", swapped("--vae", "model"), r"transformer, not a VAE", r"use wan_2\.1_vae"),
    Row("model as encoder", swapped("--text-encoder", "model"), r"a Wan 2\.1 text-to", r"umt5_xxl"),
    Row("lora as model", weights("--model", lora), r"is a LoRA", r"base model"),
    Row("empty model", weights("--model", as_bytes(b"")), r"bad\.safetensors is empty", r"again"),
    Row("model cut off", weights("--model", cut), r"cut off: 1000 bytes", r"again"),
    Row("vae cut off", weights("--vae", cut), r"vae bad\.safetensors is cut off", r"again"),
    Row(
        "pointer", weights("--model", as_bytes(b"version https://git-lfs.github.com/spec/v1\n")),
        r"Git LFS pointer", r"git lfs pull",
    ),
    Row(
        "web page", weights("--vae", as_bytes(b"<!DOCTYPE html><html>")), r"a web page", r"again",
    ),
    Row(
        "header bomb", weights("--model", as_bytes(struct.pack("<Q", 2**62) + b"{}")),
        r"inside its header", r"again",
    ),
    Row(
        "pickle with code", weights("--model", pickled, "bad.pt"),
        r"unsafe pickle", r"convert it to safetensors",
    ),
    Row(
        "old pickle with code",
        weights("--model", lambda path: path.write_bytes(pickle.dumps(Evil())), "bad.pt"),
        r"before 2020", r"safetensors",
    ),
    Row("36 channels", weights("--model", patches(36)), r"36 input channels", r"text-to-video"),
    Row("48 channels", weights("--model", patches(48)), r"48 channels", r"1\.3B or 14B"),
    Row(
        "image to video",
        weights("--model", transformer(lambda t: t.update({"img_emb.a": torch.ones(1)}))),
        r"image-to-video", r"text-to-video file",
    ),
    Row(
        "tensor missing", weights("--model", transformer(lambda t: t.pop("blocks.1.norm3.bias"))),
        r"blocks\.1\.norm3\.bias", r"use the whole file",
    ),
    Row(
        "tensor misshapen",
        weights("--model", transformer(lambda t: t.update({"head.head.bias": torch.ones(3)}))),
        r"head\.head\.bias \[3\], not \[64\]", r"use the complete",
    ),
    Row(
        "vae tensor missing",
        weights("--vae", lambda path: save_model(
            path, {n: t for n, t in random_vae(8, 0).state_dict().items() if n != "conv2.bias"},
        )),
        r"missing: conv2\.bias", r"use the complete",
    ),
    Row("narrow encoder", weights("--text-encoder", narrow_encoder), r"48 values", r"belongs to"),
    Row(
        "bad preset", weights("--model", stating(preset="sora")), r"preset 'sora'", r"known: self",
    ),
    Row("refused", weights("--model", stating(preset="wan_t2v")), r"original Wan", r"use a causal"),
]  # fmt: skip
CACHES = [
    Row(
        "cache missing", lambda f, shelf: [*shelf.options, "--continue-from", "no.cache"],
        r"no\.cache does not exist", r"--save-cache",
    ),
    Row("cache empty", bad_cache(as_bytes(b"")), r"bad\.cache", r"--save-cache"),
    Row("cache cut", bad_cache(lambda p: os.truncate(p, 9000)), r"bad\.cache", r"--save-cache"),
    Row(
        "a model as cache",
        lambda f, shelf: [*shelf.options, "--continue-from", str(shelf.model)],
        r"model\.safetensors is not a cache", r"--save-cache",
    ),
    Row("cache of another model", cache("--model", "MODEL"), r"another model", r"start anew"),
    Row("cache size", cache("--size", "64x64"), r"size 32x32, not 64x64", r"use 32x32"),
    Row("cache chunk", cache("--chunk", "3"), r"chunk 2, not 3", r"use 2"),
    Row("cache window", cache("--window", "8"), r"window 6, not 8", r"use 6"),
    Row("cache sink", cache("--sink", "2"), r"sink 1, not 2", r"use 1"),
    Row("cache positions", cache("--positions", "absolute"), r"positions relative", r"use rel"),
    Row("cache fps", cache("--fps", "24"), r"frame rate 16, not 24", r"use 16"),
    Row("cache cfg", cache("--cfg", "3", "--negative", "a"), r"cfg 1, not above 1", r"use 1"),
    Row(
        "cache finished",
        lambda f, shelf: [*shelf.options, "--continue-from", str(shelf.folder / "good.cache")],
        r"all generated", r"more steps", bare=True,
    ),
    Row("cache and image", cache("--image", "a.png"), r"--image and --continue-from", r"own end"),
    Row(
        "cache and goal without steps",
        lambda f, shelf: [
            *shelf.options, "--continue-from", str(shelf.folder / "good.cache"), "--goal", "1=a",
        ],
        r"--goal", r"--steps", bare=True,
    ),
    Row(
        "cache over itself",
        lambda f, shelf: [*bad_cache(nothing)(f, shelf), "--save-cache", "bad.cache"],
        r"bad\.cache is --continue-from", r"choose another",
    ),
]  # fmt: skip
JOURNALS = [
    Row("no journal", given("--resume", "no.mp4"), r"no\.mp4\.journal", r"beside the video", True),
    Row("foreign", resumed(as_bytes(b"dear diary")), r"a\.mp4\.journal is not", r"NAME\.j", True),
    Row("journal empty", resumed(as_bytes(b"")), r"a\.mp4\.journal is not", r"give the", True),
    Row("damaged", resumed(flip), r"a\.mp4\.journal has no start", r"begin the video anew", True),
    Row("torn start", resumed(lambda p: os.truncate(p, 99)), r"no start", r"begin", True),
    Row(
        "journal of another model", resumed(rewritten(fingerprint="0" * 32)),
        r"another model: .*00000000", r"load that model", True,
    ),
    Row("no origin", resumed(rewritten(origin=None)), r"a\.mp4\.journal does", r"begin anew", True),
    Row(
        "bad origin", resumed(rewritten(origin={"model": 5})), r"model 5", r"begin anew", True,
    ),
    Row(
        "files moved", resumed(rewritten(origin={"model": "/gone.pt", "vae": "/gone"})),
        r"/gone\.pt", r"check the path", True,
    ),
    Row("bad settings", resumed(rewritten(settings={})), r"settings", r"begin anew|damaged", True),
    Row("of a cache", resumed(rewritten(cache="ab")), r"a cache", r"--continue-from", True),
    Row("resume and seed", resumed(nothing, "--seed", "3"), r"--seed", r"leave it out", True),
    Row("resume and image", resumed(nothing, "--image", "a"), r"--image", r"leave it out", True),
    Row("resume and out", resumed(nothing, "--out", "b.mp4"), r"--out", r"leave it out", True),
    Row("resume and steps", resumed(nothing, "--steps", "s"), r"--steps", r"leave it out", True),
    Row("resume, codec", resumed(nothing, "--codec", "vp9"), r"--codec", r"leave it out", True),
    Row(
        "resume, other encoder", resumed(nothing, "--text-encoder", "no"),
        r"text encoder no", r"check the path", True,
    ),
]  # fmt: skip
# What the loaders do not refuse yet.
CRAFTED = [
    Row("torch file under another name", weights("--model", pickled), r"torch file", r"rename"),
    Row(
        "cache without keys",
        refrozen(keys=lambda c: (), values=lambda c: ()),
        r"bad\.cache|cache",
        r"again|anew",
    ),
    Row(
        "cache of other heads",
        refrozen(
            keys=lambda c: tuple(k[..., :64] for k in c.keys),
            values=lambda c: tuple(v[..., :64] for v in c.values),
        ),
        r"cache",
        r"again|anew",
    ),
    Row("cache of lost frames", refrozen(frontier=lambda c: 1), r"cache", r"again|anew"),
]
SAMPLING = SCHEDULES + SIZES + PICTURES + NUMBERS + POLICIES + GUIDANCE
ROWS = SAMPLING + OUTPUTS + WEIGHTS + CACHES + JOURNALS


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    """A model, a cache of it, and the journal of a video that was stopped."""
    folder = tmp_path_factory.mktemp("shelf")
    made = make_shelf(folder)
    (folder / "steps.txt").write_text(STEPS)
    arguments = [*made.options, "--steps", folder / "steps.txt", *SIZE]
    arguments += ["--save-cache", folder / "good.cache"]
    assert generate(*arguments, "--out", folder / "done.mp4") == 0
    make = Rollout.make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollout, "make", lambda self, c: make(self, c) if self.chunk < 1 else full())
        assert generate(*arguments[:-2], "--out", folder / "stopped.mp4") == 1
    transformer(lambda tensors: tensors["head.head.bias"].add_(1))(folder / "other.safetensors")
    yield made


def full() -> torch.Tensor:
    raise OSError(28, "No space left on device")


@pytest.fixture(autouse=True)
def no_sampling(monkeypatch: pytest.MonkeyPatch, shelf: Shelf) -> None:
    def sample(*_: object) -> None:
        pytest.fail("something was sampled")

    monkeypatch.setattr(Rollout, "make", sample)
    monkeypatch.setattr(Rollout, "commit", sample)


def refused(
    command: str, row: Row, folder: Path, shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> str:
    """Run a row; return the one line it must end with, having touched nothing."""
    (folder / "good.txt").write_text(MORE)
    options = row.build(folder, shelf)
    options = [str(shelf.folder / "other.safetensors") if o == "MODEL" else o for o in options]
    if not row.bare:
        options = ["--steps", "good.txt", *SIZE, *options]
    before = contents(folder, shelf.folder)
    capsys.readouterr()
    code = main([command, *options])
    printed = capsys.readouterr()
    assert code == 2, printed
    assert contents(folder, shelf.folder) == before
    assert not printed.out
    (line,) = printed.err.splitlines()
    assert line.startswith("sneakpeek: ") and line.isprintable()
    assert not re.search(r"[.!?] +[A-Z]|Traceback", line), "more than one sentence"
    return line


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


@pytest.mark.parametrize("row", CRAFTED, ids=lambda row: row.name)
def test_crafted_files_are_refused(
    row: Row,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shelf: Shelf,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Parts that do not belong together get their sentence before any sampling."""
    monkeypatch.chdir(tmp_path)
    line = refused("generate", row, tmp_path, shelf, capsys)
    assert re.search(row.blames, line) and re.search(row.fix, line), line


@pytest.mark.parametrize("row", SAMPLING + WEIGHTS[:2], ids=lambda row: row.name)
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


@pytest.mark.parametrize(
    ("build", "blames"),
    [
        (given("none.pt"), r"none\.pt does not exist"),
        (folder_named("d", "d"), r"d is a folder"),
        (file_named("a.mp4", "a.mp4", content=b"\0\0\0\x18ftypmp42"), r"a\.mp4 is not an MP4"),
        (file_named("a.journal", "a.journal", content=MAGIC), r"a\.journal has no start"),
    ],
)
def test_inspect_says_what_is_wrong(
    build: Build,
    blames: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shelf: Shelf,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file that is not there or not whole gets a sentence too."""
    monkeypatch.chdir(tmp_path)
    line = refused("inspect", Row("", build, blames, "", bare=True), tmp_path, shelf, capsys)
    assert re.search(blames, line), line


def test_a_thin_picture_is_fitted_without_being_blown_up() -> None:
    """A picture of one pixel by a million becomes the size asked for, from its middle."""
    from sneakpeek_core.pictures import fitted

    thin = torch.zeros(1, 1, 1_000_000, 3)
    thin[:, :, 499_999:500_001] = 1
    made = fitted(thin, 32, 32)
    assert made.shape == (1, 32, 32, 3)
    assert made.mean() > 0.9


def test_pictures_keep_their_middle(tmp_path: Path) -> None:
    """Fitting cuts what stands out on both sides alike, and fills the whole size."""
    from sneakpeek_core.pictures import fitted, load_picture

    wide = Image.new("RGB", (96, 32), "black")
    wide.paste((255, 255, 255), (32, 0, 64, 32))
    wide.save(tmp_path / "wide.png")
    made = fitted(load_picture(tmp_path / "wide.png"), 16, 16)
    assert made.shape == (1, 16, 16, 3) and made.min() > 0.99
