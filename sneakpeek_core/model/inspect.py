"""Says what a file is and whether it can be streamed: `sneakpeek inspect FILE`.

Safetensors files are described from their header alone; torch files stay memory-mapped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..shapes import LATENT_CHANNELS
from ..vae.wan import vae_dim
from .checkpoint import bare_names, choose, wrappers_of
from .config import ModelConfig
from .presets import Preset, preset_for
from .recognise import Recognised, config_from_shapes, recognise
from .tensor_files import TensorEntry, entry_of, open_tensors, read_header, sniff
from .weights import KIND, expected_names, text_len

_SHOWN = 120  # characters of one metadata value
_OURS = {
    "cache": ("a SneakPeek cache", "load it with Load Cache, beside the model it was made with"),
    "text_encoder": ("SneakPeek's tiny text encoder", "give it as the text encoder"),
}


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is known of one file. `str()` gives lines for a terminal."""

    path: Path
    bytes: int
    kind: str  # transformer, vae, text encoder, lora, cache, journal or unknown
    label: str = ""
    preset: Preset | None = None  # of a transformer: how it is sampled, and how that was found
    config: ModelConfig | None = None  # of a transformer
    vae_dim: int | None = None  # base width of a VAE
    streamable: bool = False
    problem: str = ""  # why it cannot be streamed, and what to do
    sizes: str = ""
    parameters: int = 0
    dtypes: tuple[str, ...] = ()  # most bytes first
    source: str = ""  # the key that its weights lie under
    wrappers: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        preset = self.preset
        family = f"{preset.name} (by {preset.recognised_by})" if preset else ""
        rows = [
            ("file", f"{self.path.name}, {_in_words(self.bytes)}"),
            ("kind", f"{self.kind}: {self.label}" if self.label else self.kind),
            ("family", family),
            ("sizes", self.sizes),
            ("parameters", f"{self.parameters:,}" if self.parameters else ""),
            ("dtype", ", ".join(self.dtypes)),
            ("key", self.source),
            ("wrappers", ", ".join(self.wrappers)),
            ("streams", "yes" if self.streamable else f"no: {self.problem}"),
            *((f"  {_clean(k)}", _clean(v)) for k, v in self.metadata.items()),
        ]
        return "\n".join(f"{name:<11} {value}" for name, value in rows if value)


def describe(path: str | Path) -> Description:
    """Describe any file; `ValueError` only when there is none or it cannot be opened."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder; name a file inside it" if path.is_dir() else "does not exist; check it"
        raise ValueError(f"{path} {what}")
    size = path.stat().st_size
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be opened ({error.strerror}); check it") from error
    try:
        return _describe_tensors(path, size)
    except ValueError as error:
        return Description(path=path, bytes=size, kind="unknown", problem=str(error))


def _describe_tensors(path: Path, size: int) -> Description:
    entries, metadata, source, wrappers = _entries(path)
    shapes = {name: entry.shape for name, entry in entries.items()}
    found = _own_kind(metadata) or recognise(shapes)
    config, preset, dim, problem = None, None, None, found.problem
    if found.kind == "transformer" and not problem:
        try:
            config = config_from_shapes(shapes, text_len(metadata))
            preset = preset_for(path, metadata, config, source)
            problem = preset.refusal or _odd_names(config, shapes)
        except ValueError as error:
            problem = str(error)
    elif found.kind == "vae" and not problem:
        dim = vae_dim(shapes)
        problem = "it is one half of a stream: give it as the VAE, with a transformer"
    return Description(
        path=path,
        bytes=size,
        kind=found.kind,
        label=found.label,
        preset=preset,
        config=config,
        vae_dim=dim,
        streamable=not problem,
        problem=problem,
        sizes=_sizes(config, dim),
        parameters=sum(math.prod(entry.shape) for entry in entries.values()),
        dtypes=_dtypes(entries),
        source=source,
        wrappers=wrappers,
        metadata=metadata,
    )


def _entries(
    path: Path,
) -> tuple[dict[str, TensorEntry], dict[str, str], str, tuple[str, ...]]:
    if sniff(path) == "safetensors":
        named, metadata = read_header(path)
        return bare_names(named), metadata, "", wrappers_of(named)
    tree, metadata = open_tensors(path)
    tensors, source = choose(tree)
    named = {name: entry_of(tensor) for name, tensor in tensors.items()}
    return bare_names(named), metadata, source, wrappers_of(named)


def _own_kind(metadata: Mapping[str, str]) -> Recognised | None:
    kind = metadata.get(KIND, "")
    if kind.startswith("journal"):
        return Recognised("journal", "a SneakPeek journal", "continue it with Resume")
    if kind in _OURS:
        label, problem = _OURS[kind]
        return Recognised(kind.replace("_", " "), label, problem)
    return None  # ours or not, transformers and VAEs are judged by their tensors


def _odd_names(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> str:
    odd = sorted(expected_names(config) ^ shapes.keys())
    some = ", ".join(odd[:4])
    return (
        f"{len(odd)} tensors are missing or unexpected ({some}); use the whole file" if odd else ""
    )


def _sizes(config: ModelConfig | None, vae_dim: int | None) -> str:
    if vae_dim is not None:
        return f"base width {vae_dim}, {LATENT_CHANNELS} channels"
    if config is None:
        return ""
    return (
        f"width {config.dim}, {config.layers} layers, {config.heads} heads, "
        f"feed-forward {config.ffn_dim}, text {config.text_len} x {config.text_dim}"
    )


def _dtypes(entries: Mapping[str, TensorEntry]) -> tuple[str, ...]:
    total: Counter[str] = Counter()
    for entry in entries.values():
        total[entry.dtype] += entry.bytes
    return tuple(dtype for dtype, _ in total.most_common())


def _in_words(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB ({size:,} bytes)"


def _clean(text: str) -> str:
    # Metadata is anyone's text: no control characters reach the terminal.
    shown = "".join(c if c.isprintable() else " " for c in text)
    return shown if len(shown) <= _SHOWN else shown[:_SHOWN] + " ..."
