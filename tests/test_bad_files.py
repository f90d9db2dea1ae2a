"""Bad files of every kind: one sentence with the fix, before sampling, nothing left behind."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sneakpeek_core.cache import Keyframe
from sneakpeek_core.frozen import FrozenCache
from sneakpeek_core.journal import MAGIC, Journal, read
from sneakpeek_core.model.initial import random_vae
from sneakpeek_core.model.weights import save_model
from sneakpeek_core.records import metadata_of
from sneakpeek_core.text_encoder import random_text_encoder, save_text_encoder
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
    transformer,
    weights,
)
from tests.command_line import Shelf
from tests.small import CONFIG


def as_bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def patches(channels: int) -> Callable[[Path], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["patch_embedding.weight"] = torch.zeros(CONFIG.dim, channels, 1, 2, 2)
        if channels == 48:
            tensors["head.head.weight"] = torch.zeros(4 * 48, CONFIG.dim)

    return transformer(change)


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
        start, *rest = read(path)
        with Journal.create(path, start._replace(header=start.header | changes)) as journal:
            for record in rest:
                journal.append(record)

    return change


def reheaded(change: Callable[[dict[str, Any]], object]) -> Build:
    """A cache whose header was changed by hand."""

    def rewrite(path: Path) -> None:
        record = FrozenCache.load(path)._to_record()
        change(record.header)
        save_file(record.tensors, path, metadata=metadata_of(record))

    return bad_cache(rewrite)


def rechunked(**changes: object) -> Callable[[Path], object]:
    """Change the first chunk of a journal: its `latents`, or its header."""

    def change(path: Path) -> None:
        start, first, *rest = read(path)
        header = first.header | {k: v for k, v in changes.items() if k != "latents"}
        latents = changes.get("latents", first.tensors["latents"])
        assert isinstance(latents, torch.Tensor)
        with Journal.create(path, start) as journal:
            for record in (first._replace(header=header, tensors={"latents": latents}), *rest):
                journal.append(record)

    return change


def nothing(path: Path) -> None:
    pass


def flip(path: Path) -> None:
    """Damage the first record: its checksum no longer holds."""
    data = bytearray(path.read_bytes())
    data[len(MAGIC) + 40] ^= 255
    path.write_bytes(data)


WEIGHTS = [
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
HEADERS: list[Callable[[dict[str, Any]], object]] = [
    lambda h: h.update(fps=float("inf")),
    lambda h: h.update(fps=0),
    lambda h: h.update(frontier=float("inf")),
    lambda h: h.update(chunk=-5),
    lambda h: h.update(planned_at=10**9),
    lambda h: h.update(frames=[float(frame) for frame in h["frames"]]),
    lambda h: h.update(future=[["x", 0, 0.0, "predicted", False, 0]]),
    lambda h: h.update(size=[[32], 32]),
    lambda h: h.update(size=[32, 16 * 10**6]),
    lambda h: h.update(fingerprint=5),
    lambda h: h["settings"].update(chunk=2.0),
    lambda h: h["settings"]["policy"].update(policy=["x"]),
    lambda h: h["schedule"].update(version="7"),
    lambda h: h["schedule"].update(base=5),
    lambda h: h["schedule"]["steps"][0].update(text=[1]),
    lambda h: h["schedule"]["steps"][0].update(text_in=10**9),
]
CHUNKS = [
    rechunked(number=1),
    rechunked(number="0"),
    rechunked(planned_at=0.5),
    rechunked(latents=torch.zeros(1, 16, 1, 8, 8)),
    rechunked(latents=torch.zeros(1, 16, 0, 4, 4)),
    rechunked(latents=torch.zeros(1, 16, 9, 4, 4)),
    rechunked(latents=torch.zeros(4, 4)),
    rechunked(latents=torch.zeros(1, 16, 1, 4, 4, dtype=torch.long)),
    rechunked(latents=torch.full((1, 16, 1, 4, 4), float("nan"))),
    rewritten(fps=0),
    rewritten(size=[32]),
    rewritten(size=[3_200_000, 3_200_000]),
    rewritten(schedule={"steps": [], "base": "", "version": 0}),
]
# Written by SneakPeek as far as it can be seen, but no SneakPeek writes this.
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
    Row(
        "cache of whole keys", refrozen(keys=lambda c: tuple(k.long() for k in c.keys)),
        r"bad\.cache is damaged .*fractions", r"again",
    ),
    Row(
        "cache of nan", refrozen(warm=lambda c: c.warm * float("nan")),
        r"bad\.cache is damaged .*fractions", r"again",
    ),
    Row(
        "cache, far keyframe",
        refrozen(future=lambda c: (Keyframe(10**9, 0, 0.0, "given", False, 0),)),
        r"bad\.cache is damaged", r"again",
    ),
    *(
        Row(f"cache header {i}", reheaded(change), r"bad\.cache is damaged", r"make it again")
        for i, change in enumerate(HEADERS)
    ),
    *(
        Row(f"journal chunk {i}", resumed(change), r"journal is damaged \(", r"begin anew", True)
        for i, change in enumerate(CHUNKS)
    ),
]  # fmt: skip


ROWS = WEIGHTS + CACHES + JOURNALS


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
