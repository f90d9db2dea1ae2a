"""Describing a file of weights: from its header alone, and whatever is wrong with it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sneakpeek_core.model.checkpoint import bare_name
from sneakpeek_core.model.config import ModelConfig
from sneakpeek_core.model.inspect import describe
from sneakpeek_core.model.weights import (
    KIND,
    config_from_shapes,
    load_transformer,
    random_transformer,
    read_tensors,
    save_model,
)
from tests.weight_files import SMALL, UNSUPPORTED, wan_shapes, write_header


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_transformer(SMALL, seed=0).state_dict()


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(dim=1536, ffn_dim=8960, layers=30),
        ModelConfig(dim=5120, ffn_dim=13824, layers=40),
    ],
    ids=["1.3B", "14B"],
)
def test_released_sizes_are_read_from_a_header_alone(config: ModelConfig, tmp_path: Path):
    shapes = {f"model.{name}": shape for name, shape in wan_shapes(config).items()}
    found = describe(write_header(tmp_path / "krea-realtime-video-14b.safetensors", shapes))
    assert (found.kind, found.streamable) == ("transformer", True)
    assert found.preset and found.preset.name == "krea_14b"
    assert f"width {config.dim}, {config.layers} layers, {config.heads} heads" in found.sizes
    assert (found.dtypes, found.wrappers) == (("BF16",), ("model.",))
    assert config_from_shapes({bare_name(n): s for n, s in shapes.items()}) == config


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_other_kinds_of_weights_are_refused_by_what_they_look_like(case: str, tmp_path: Path):
    shapes, words = UNSUPPORTED[case]
    with pytest.raises(ValueError, match=words):
        config_from_shapes(shapes)
    found = describe(write_header(tmp_path / "a.safetensors", shapes))
    assert not found.streamable and found.problem
    assert str(found).startswith("file ")


def bad_file(folder: Path, case: str) -> Path:
    """Write a file that cannot be read as weights."""
    path = folder / "a.safetensors"
    save_file({"w": torch.ones(100)}, path)
    whole = path.read_bytes()
    if case == "torch cut off":
        torch.save({"w": torch.ones(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
        return path
    damaged = b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'
    path.write_bytes({
        "empty": b"",
        "cut off": whole[:-40],
        "cut off in header": whole[:20],
        "huge header": struct.pack("<Q", 2**62) + b"{}",
        "damaged header": struct.pack("<Q", 4) + b"{{{{",
        "nested header": struct.pack("<Q", 200_000) + b'{"a":' + b"[" * 199_995,
        "shape beyond bytes": struct.pack("<Q", len(damaged)) + damaged + bytes(4),
        "web page": b"\n<!DOCTYPE html><html>sign in</html>",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "gguf": b"GGUF\x03\0\0\0" + bytes(60),
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(60),
        "zip": b"PK\x03\x04" + bytes(60),
    }[case])  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("empty", "is empty; download"),
        ("cut off", "is cut off: 40 bytes are missing; download"),
        ("cut off in header", "cut off inside its header"),
        ("huge header", "cut off inside its header"),
        ("damaged header", "damaged safetensors header"),
        ("nested header", "damaged safetensors header"),
        ("shape beyond bytes", "damaged safetensors header"),
        ("web page", "is a web page, not weights"),
        ("lfs", "git lfs pull"),
        ("gguf", "is a GGUF file"),
        ("picture", "neither safetensors nor a torch file"),
        ("torch cut off", "is cut off or damaged"),
        ("zip", "is cut off or damaged"),
    ],
)
def test_broken_files_are_refused_in_a_sentence_and_still_described(
    case: str, words: str, tmp_path: Path
):
    path = bad_file(tmp_path, case)
    with pytest.raises(ValueError, match=words) as error:
        read_tensors(path)
    assert str(error.value).startswith("a.safetensors ") and "\n" not in str(error.value)
    found = describe(path)
    assert (found.kind, found.streamable) == ("unknown", False)
    assert found.bytes == path.stat().st_size and words.split(";")[0] in found.problem


def test_a_torch_checkpoint_is_described(state: dict[str, Tensor], tmp_path: Path):
    wrapped = {f"model._fsdp_wrapped_module.{n}": t.half() for n, t in state.items()}
    torch.save({"generator_ema": wrapped}, tmp_path / "self_forcing_dmd.pt")
    found = describe(tmp_path / "self_forcing_dmd.pt")
    assert (found.streamable, found.source) == (True, "generator_ema")
    assert found.preset and found.preset.name == "self_forcing"
    assert found.wrappers == ("_fsdp_wrapped_module.", "model.")
    assert found.dtypes == ("F16",)
    assert found.parameters == sum(t.numel() for t in state.values())
    assert "(by its file name, self_forcing_dmd.pt)" in str(found)


@pytest.mark.parametrize(
    ("kind", "shown"), [("cache", "cache"), ("journal-1", "journal"), ("text_encoder", "text enc")]
)
def test_our_own_kinds_are_told_by_their_metadata(kind: str, shown: str, tmp_path: Path):
    save_model(tmp_path / "a.safetensors", {"w": torch.ones(1)}, {KIND: kind, "note": "a\x1b[2Jb"})
    found = describe(tmp_path / "a.safetensors")
    assert found.kind.startswith(shown) and not found.streamable
    assert "\x1b" not in str(found) and "a [2Jb" in str(found)


def test_families_that_need_another_loop_are_not_streamable(
    state: dict[str, Tensor], tmp_path: Path
):
    torch.save({"generator_ema": state}, tmp_path / "rolling_forcing_dmd.pt")
    assert "staggered noise" in describe(tmp_path / "rolling_forcing_dmd.pt").problem
    with pytest.raises(ValueError, match="staggered noise levels"):
        load_transformer(tmp_path / "rolling_forcing_dmd.pt").preset.check_runnable()


def test_an_incomplete_transformer_is_not_streamable(state: dict[str, Tensor], tmp_path: Path):
    save_file({n: t for n, t in state.items() if n != "head.modulation"}, tmp_path / "a.st")
    assert (
        "1 tensors are missing or unexpected (head.modulation)"
        in describe(tmp_path / "a.st").problem
    )
