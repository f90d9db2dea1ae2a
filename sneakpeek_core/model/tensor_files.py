"""Opens files of tensors from untrusted places: safetensors, and torch files without pickled code.

Nothing is allocated before its size was compared with the file's, and tensors stay memory-mapped.
Every failure is a `ValueError` of one sentence that starts with the file's name and ends with what
to do about it.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

AGAIN = "download or copy it again"
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_PICKLE_BYTES = 256_000_000  # tables of names; the tensors lie beside the pickle in the archive
BYTES_OF = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_NOT_WEIGHTS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"<", f"is a web page, not weights; the download failed or needs a login, so {AGAIN}"),
    (b"GGUF", "is a GGUF file, which only ComfyUI-GGUF's loader opens; use a safetensors file"),
    (b"\x80", "is a torch file of a format before 2020; load and save it again as safetensors"),
)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file, unread: shape, dtype as safetensors spells it ("BF16"), bytes."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int


def open_tensors(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tree of tensors in a file and its metadata.

    A safetensors file gives a flat dict; a torch file what was saved, which may be nested and hold
    plain values besides. Tensors are on the CPU, in the file's dtype, memory-mapped where possible.
    """
    path = Path(path)
    if sniff(path) == "torch":
        return _open_torch(path), {}
    entries, metadata = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in entries}, metadata
    except (SafetensorError, OSError, AttributeError) as error:
        raise ValueError(f"{path.name} cannot be read ({error}); {AGAIN}") from error


def sniff(path: str | Path) -> str:
    """Return "safetensors" or "torch" by the first bytes; `ValueError` for anything else."""
    path = Path(path)
    head = _first_bytes(path)
    if head[:4] == b"PK\x03\x04":
        return "torch"
    if head[8:9] == b"{":
        return "safetensors"
    for magic, words in _NOT_WEIGHTS:
        if head.lstrip().startswith(magic):
            raise ValueError(f"{path.name} {words}")
    raise ValueError(f"{path.name} is neither safetensors nor a torch file; {AGAIN}")


def read_header(path: str | Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Return the entries and the metadata of a safetensors file without reading any tensor."""
    path = Path(path)
    _first_bytes(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"{path.name} is cut off inside its header; {AGAIN}")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = {str(k): str(v) for k, v in (header.pop("__metadata__", None) or {}).items()}
        entries = {name: _entry(value) for name, value in header.items()}
        end = max((value["data_offsets"][1] for value in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path.name} has a damaged safetensors header; {AGAIN}") from error
    if end > size - 8 - length:
        missing = end - (size - 8 - length)
        raise ValueError(f"{path.name} is cut off: {missing} bytes are missing; {AGAIN}")
    return entries, metadata


def entry_of(tensor: Tensor) -> TensorEntry:
    """Describe a loaded tensor as a header would."""
    name = str(tensor.dtype).removeprefix("torch.")
    spelled = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
    short = spelled.get(name) or re.sub(r"^(float|int|uint)", lambda m: m[1][0].upper(), name)
    return TensorEntry(tuple(tensor.shape), short, tensor.numel() * tensor.element_size())


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the weight file inside it")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; check the name and the folder") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be opened ({error.strerror}); check it") from error
    if not head:
        raise ValueError(f"{path.name} is empty; {AGAIN}")
    return head


def _entry(value: dict[str, Any]) -> TensorEntry:
    begin, end = value["data_offsets"]
    shape, dtype = tuple(value["shape"]), str(value["dtype"])
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)) or begin > end:
        raise ValueError("sizes and offsets must be whole numbers")
    # Sub-byte formats are newer than this table; safetensors itself checks those.
    if dtype in BYTES_OF and math.prod(shape) * BYTES_OF[dtype] != end - begin:
        raise ValueError("a shape does not fit its bytes")
    return TensorEntry(shape, dtype, end - begin)


def _open_torch(path: Path) -> dict[str, Any]:
    _check_archive(path)
    if path.suffix == ".safetensors":  # torch.load goes by the name
        name = path.with_suffix(".pt").name
        raise ValueError(f"{path.name} is a torch file under another name; rename it to {name}")
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_unsafe(path, error)) from error
    except (RuntimeError, OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is a damaged torch file; {AGAIN}") from error
    if not isinstance(tree, dict):
        kind = type(tree).__name__
        raise ValueError(f"{path.name} holds a {kind}, not named tensors; save a state dict")
    size = path.stat().st_size
    for name, tensor in _tensors(tree):
        # An expanded view of one value would claim any size once it is copied.
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > size:
            raise ValueError(f"{path.name}: tensor {name} is larger than the file; {AGAIN}")
    return tree


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [m for m in archive.infolist() if m.filename.endswith("/data.pkl")]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{path.name} is cut off or damaged; {AGAIN}") from error
    if not pickles:
        raise ValueError(f"{path.name} is a zip archive without tensors; unpack it first")
    if max(m.file_size for m in pickles) > MAX_PICKLE_BYTES:
        raise ValueError(f"{path.name} has an implausibly large table of names; {AGAIN}")


def _unsafe(path: Path, error: Exception) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    needs = f" (it asks for {found[1]})" if found else ""
    return (
        f"{path.name} is an unsafe pickle: opening it would run code{needs}, so it was not opened; "
        "convert it to safetensors on a machine where you trust it"
    )


def _tensors(tree: dict[Any, Any], depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    for name, value in tree.items():
        if isinstance(value, Tensor):
            yield str(name), value
        elif isinstance(value, dict) and depth < 8:
            yield from _tensors(value, depth + 1)
