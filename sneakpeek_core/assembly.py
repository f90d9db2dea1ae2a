"""From file names to a stream: loads the parts, fits them together, and checks that they do fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .conditioning import Conditioner, Encode
from .denoiser import Denoiser
from .model.config import ModelConfig
from .model.inspect import Description, describe
from .model.lora import merge_lora
from .model.presets import Preset
from .model.weights import load_transformer, load_vae, weights_fingerprint
from .pictures import fitted, load_picture
from .processor import has_bf16
from .schedule import Schedule
from .stream import Model
from .text_encoder import load_text_encoder
from .vae.streaming import encode_image
from .vae.wan import WanVAE

EMBEDDED = Path(__file__).parent / "embedded"
TINY = tuple(EMBEDDED / f"tiny_{part}.safetensors" for part in ("model", "vae", "text_encoder"))
BIG = 100_000_000  # parameters above which auto picks a half precision


@dataclass(frozen=True, kw_only=True)
class Files:
    """Paths of the three parts, and of a LoRA on the model.

    Without a text encoder, texts must be embedded already.
    """

    model: Path
    vae: Path
    text_encoder: Path | None = None
    lora: Path | None = None

    @classmethod
    def of(
        cls,
        model: Path | None = None,
        vae: Path | None = None,
        text_encoder: Path | None = None,
        lora: Path | None = None,
    ) -> Files:
        """Return the files that were given; without a model, the tiny one that is embedded here.

        `ValueError` for half a pair, and for a file that is not there.
        """
        if model is vae is text_encoder is None:
            model, vae, text_encoder = TINY
        if model is None or vae is None:
            missing = "--vae" if vae is None else "--model"
            raise ValueError(
                f"{missing} is missing: a model and its VAE belong together; give both"
            )
        files = {"model": model, "vae": vae, "text encoder": text_encoder, "lora": lora}
        for name, path in files.items():
            if path is not None and not path.exists():
                raise ValueError(f"{name} {path} does not exist; check the path")
        return cls(model=model, vae=vae, text_encoder=text_encoder, lora=lora)


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What the headers of the files say, before anything is loaded."""

    config: ModelConfig
    preset: Preset
    parameters: int
    vae_dim: int

    def dtype(self, wanted: torch.dtype | None) -> torch.dtype:
        """Return the dtype to run in: the wanted one, else fp32 for small models and bf16."""
        return wanted or (torch.bfloat16 if self.parameters > BIG else torch.float32)


def outline_of(files: Files) -> Outline:
    """Read the headers; `ValueError` in words when a file is not what it is given as."""
    model, vae = _described("model", files.model), _described("vae", files.vae)
    if model.config is None or model.preset is None or not model.streamable:
        raise ValueError(f"model {model.path.name} is {model.label}: {model.problem}")
    if vae.kind == "vae" and vae.vae_dim is None:
        raise ValueError(f"vae {vae.path.name} is {vae.label}: {vae.problem}")
    if vae.vae_dim is None:
        raise ValueError(
            f"vae {vae.path.name} is {vae.label}, not a VAE; use wan_2.1_vae.safetensors"
        )
    if files.text_encoder and not files.text_encoder.is_dir():
        text = _described("text encoder", files.text_encoder)
        if text.kind != "text encoder":
            raise ValueError(
                f"text encoder {text.path.name} is {text.label}; use umt5_xxl_fp16.safetensors, "
                "or the tiny one that comes with SneakPeek"
            )
    return Outline(
        config=model.config,
        preset=model.preset,
        parameters=model.parameters,
        vae_dim=vae.vae_dim,
    )


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything loaded: what samples, what turns latents into frames, what reads text."""

    model: Model
    config: ModelConfig
    preset: Preset
    vae: WanVAE
    encode: Encode | None


def load_parts(files: Files, *, device: torch.device, dtype: torch.dtype | None = None) -> Parts:
    """Load the parts onto a device; for `dtype` None see `Outline.dtype`.

    `ValueError` in words when a file is not what it should be or the parts do not fit together.
    """
    outline = outline_of(files)
    config, preset, dtype = outline.config, outline.preset, outline.dtype(dtype)
    tree = load_transformer(files.model, dtype=dtype, device=device).tree
    if files.lora:
        merge_lora(tree, files.lora)
    vae = load_vae(files.vae, vae_dtype(dtype, device), device)
    path = files.text_encoder
    encode = load_text_encoder(path, dtype=_rough(dtype)) if path else None
    denoiser = Denoiser(tree.eval().requires_grad_(False), dtype=dtype, text_len=config.text_len)
    fingerprint = weights_fingerprint(tree.state_dict())
    model = Model(denoiser=denoiser, fingerprint=fingerprint, device=device)
    vae = vae.eval().requires_grad_(False)
    return Parts(
        model=model, config=config, preset=preset, vae=vae, encode=_checked(encode, config)
    )


def vae_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return what the VAE computes in beside a model in `dtype`.

    Decoding is all convolution: on a CPU without bf16 units fp32 is four times as fast.
    """
    return torch.float32 if device.type == "cpu" and not has_bf16() else _rough(dtype)


def _rough(dtype: torch.dtype) -> torch.dtype:
    """Half precision for VAE and text encoder is bf16: both overflow in fp16."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def conditioner_for(parts: Parts, fps: float, size: tuple[int, int], negative: str | None):
    """Return what turns schedules into conditioning, with the parts' text encoder and VAE."""
    embeds = None
    if negative is not None:
        if parts.encode is None:
            raise ValueError("a negative text needs a text encoder; give --text-encoder")
        embeds = parts.encode([negative])[0].unsqueeze(0)

    def encode_goal(image: object) -> Tensor:
        assert isinstance(image, Tensor)
        return encode_picture(parts.vae, image, size)

    return Conditioner(fps=fps, encode=parts.encode, encode_goal=encode_goal, negative=embeds)


def encode_picture(vae: WanVAE, image_BHWC: Tensor, size: tuple[int, int]) -> Tensor:
    """Fit a picture to (width, height) and encode it alone: [B, C, 1, H, W], fp32, on the CPU."""
    first = next(vae.parameters())
    with torch.no_grad():
        return encode_image(vae, fitted(image_BHWC, *size).to(first.device)).float().cpu()


def with_goals(schedule: Schedule, goals: Mapping[int, Path]) -> Schedule:
    """Attach goal pictures to steps, numbered from 1; `ValueError` for a step there is not."""
    steps = list(schedule.steps)
    for number, path in goals.items():
        if not 1 <= number <= len(steps):
            raise ValueError(
                f"goal {number}={path}: there is no step {number}; use 1 to {len(steps)}"
            )
        steps[number - 1] = replace(steps[number - 1], goal=load_picture(path, f"goal {number}"))
    return replace(schedule, steps=tuple(steps))


def _checked(encode: Encode | None, config: ModelConfig) -> Encode | None:
    if encode is None:
        return None

    def checked(texts: list[str]) -> list[Tensor]:
        embeds = encode(texts)
        if embeds and embeds[0].shape[-1] != config.text_dim:
            raise ValueError(
                f"the text encoder gives {embeds[0].shape[-1]} values a token, the model takes "
                f"{config.text_dim}; use the text encoder that belongs to the model"
            )
        return embeds

    return checked


def _described(role: str, path: Path) -> Description:
    found = describe(path)
    if not found.label:  # it cannot be read at all
        raise ValueError(f"{role} {found.problem}")
    return found
