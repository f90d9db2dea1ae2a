"""How each known family of causal Wan checkpoints wants to be sampled. No torch here.

Noise levels are kept as the list that the family publishes (`timesteps`, 1000 = noise, before the
shift); `Preset.sigmas` derives the final ones. Numbers: each family's own code and configuration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..guidance import FutureGuidance
from ..sigmas import few_step_sigmas, uniform_sigmas
from .config import ModelConfig

FOUR_STEPS = (1000.0, 750.0, 500.0, 250.0)
SOLVERS = ("renoise", "euler")
POSITIONS = ("absolute", "relative")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sampling settings of one family. Frames are latent frames; the defaults are Self Forcing's.

    Exactly one of `timesteps` (a list) and `steps` (a count of evenly spaced levels) is given.
    """

    name: str
    chunk: int = 3  # generated together
    timesteps: tuple[float, ...] = FOUR_STEPS
    warp: bool = True  # `timesteps` are before the shift; False: they are final
    first_timesteps: tuple[float, ...] | None = None  # of the first chunk, where it differs
    steps: int | None = None  # undistilled models
    shift: float = 5.0
    solver: str = "renoise"  # fresh noise between steps; "euler" follows the flow
    cfg: float = 1.0  # above 1 the negative prompt has a cache of its own
    window: int | None = None  # newest frames, open chunk included, sink not; None keeps all
    sink: int = 0  # oldest frames, never evicted
    positions: str = "absolute"
    fps: float = 16.0
    trained_span: int = 21  # frames that the weights saw at once
    guidance: FutureGuidance | None = None  # None: not trained to predict keyframes
    source: str = ""
    licence: str = ""  # of the weights, for the user to check
    refusal: str = ""  # why this loop cannot run these weights; "" when it can
    recognised_by: str = ""  # filled in by `preset_for`

    def __post_init__(self) -> None:
        whole = (("chunk", self.chunk, 1), ("sink", self.sink, 0), ("span", self.trained_span, 1))
        for name, value, least in whole:
            if value < least:
                raise ValueError(f"preset {self.name}: {name} {value} must be at least {least}")
        if self.window is not None and self.window < self.chunk:
            raise ValueError(
                f"preset {self.name}: window {self.window} is smaller than chunk {self.chunk}, "
                f"which it includes; use {self.chunk} or more"
            )
        if not 0 < self.fps < float("inf") or not 0 <= self.cfg < float("inf"):
            raise ValueError(
                f"preset {self.name}: bad fps {self.fps} or cfg {self.cfg}; use 16 and 1"
            )
        if self.solver not in SOLVERS or self.positions not in POSITIONS:
            raise ValueError(
                f"preset {self.name}: solver {self.solver!r} must be one of {SOLVERS} and "
                f"positions {self.positions!r} one of {POSITIONS}"
            )
        for sigmas in (self.sigmas, self.first_sigmas):  # both raise for impossible lists
            if len(sigmas) < 2:
                raise ValueError(f"preset {self.name}: no noise levels; give timesteps or steps")

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Final noise levels of a chunk, from 1 down to 0."""
        if self.steps is not None:
            return uniform_sigmas(self.steps, self.shift)
        return few_step_sigmas(self.timesteps, self.shift, self.warp)

    @property
    def first_sigmas(self) -> tuple[float, ...]:
        """Final noise levels of the first chunk."""
        if self.first_timesteps is None:
            return self.sigmas
        return few_step_sigmas(self.first_timesteps, self.shift, self.warp)

    def check_runnable(self) -> None:
        """Raise `ValueError` with the reason if these weights need another sampling loop."""
        if self.refusal:
            raise ValueError(f"{self.name} weights cannot be streamed: {self.refusal}")


_APACHE = "Apache-2.0"
_NON_COMMERCIAL = "CC BY-NC-SA 4.0"
_CAUSAL = Preset(name="causal_forcing", source="thu-ml/Causal-Forcing", licence=_APACHE)
_FRAMEWISE = replace(_CAUSAL, name="causal_forcing_framewise", chunk=1)
_UNDISTILLED = replace(_CAUSAL, name="ar_diffusion", steps=50, solver="euler", cfg=3.0)

_TABLE = (
    Preset(name="self_forcing", source="guandeh17/Self-Forcing", licence=_APACHE),
    _CAUSAL,
    _FRAMEWISE,
    replace(
        _FRAMEWISE,
        name="causal_forcing_framewise_2step",
        timesteps=(1000.0, 500.0),
        first_timesteps=FOUR_STEPS,
    ),
    replace(
        _FRAMEWISE,
        name="causal_forcing_framewise_1step",
        timesteps=(1000.0,),
        first_timesteps=FOUR_STEPS,
    ),
    _UNDISTILLED,
    replace(_UNDISTILLED, name="ar_diffusion_framewise", chunk=1),
    Preset(
        name="causvid",
        timesteps=(1000.0, 757.0, 522.0),
        warp=False,
        shift=8.0,
        source="tianweiy/CausVid",
        licence=_NON_COMMERCIAL,
    ),
    Preset(
        name="longlive",
        window=12 - 3,  # its local_attn_size 12 counts the sink
        sink=3,
        source="NVlabs/LongLive v1.0",
        licence=_APACHE,
    ),
    Preset(
        name="reward_forcing",
        window=9 - 3,  # likewise
        sink=3,
        positions="relative",
        source="JaydenLyh/Reward-Forcing (its EMA sink is a cache policy)",
        licence=_APACHE,
    ),
    Preset(
        name="infinite_forcing",
        window=21 - 1,
        sink=1,
        positions="relative",
        source="SOTAMak1r/Infinite-Forcing",
        licence=_APACHE,
    ),
    Preset(
        name="krea_14b",
        timesteps=(1000.0, 937.0, 833.0, 625.0),
        warp=False,  # its configuration lists warped, rounded values
        window=2 + 3,  # the newest two of its three context frames, and the open chunk
        sink=1,
        positions="relative",
        source="krea-ai/realtime-video (recomputes its cache for every chunk)",
        licence=_NON_COMMERCIAL,
    ),
    Preset(
        name="shotstream",
        timesteps=(1000.0, 740.0, 500.0, 260.0),
        shift=8.0,
        source="KlingAIResearch/ShotStream (one shot, without its context cache)",
        licence="none stated: all rights reserved",
    ),
    Preset(
        name="rolling_forcing",
        timesteps=(1000.0, 800.0, 600.0, 400.0, 200.0),
        trained_span=27,
        source="TencentARC/RollingForcing",
        licence="academic use only",
        refusal="they denoise five chunks at staggered noise levels at once, which this loop does "
        "not do; use self_forcing_dmd.pt",
    ),
    Preset(
        name="wan_t2v",
        steps=50,
        solver="euler",
        cfg=5.0,
        source="Wan-Video/Wan2.1",
        licence=_APACHE,
        refusal="this is the original Wan 2.1, which sees all frames at once; use a causal "
        "checkpoint such as self_forcing_dmd.pt, or train this one",
    ),
    Preset(
        name="tiny",
        shift=3.0,
        solver="euler",
        window=12,
        sink=1,
        positions="relative",
        trained_span=19,
        guidance=FutureGuidance(),
        source="SneakPeek's own toy world",
        licence=_APACHE,
    ),
)
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _TABLE}
DEFAULT = "self_forcing"

# (file name, name of its folder or "" for any) -> preset; as published, lower case.
_FILES: dict[tuple[str, str], str] = {
    **{(f"self_forcing_{kind}.pt", ""): "self_forcing"
       for kind in ("dmd", "sid", "sid_v2", "gan", "10s")},
    ("causal_forcing.pt", "chunkwise"): "causal_forcing",
    ("causal_forcing.pt", "framewise"): "causal_forcing_framewise",
    **{(f"causal_{stage}.pt", "chunkwise"): "causal_forcing" for stage in ("ode", "cd")},
    **{(f"causal_{stage}.pt", "framewise"): "causal_forcing_framewise" for stage in ("ode", "cd")},
    ("ar_diffusion.pt", "chunkwise"): "ar_diffusion",
    ("ar_diffusion.pt", "framewise"): "ar_diffusion_framewise",
    ("longvideo.pt", "chunkwise"): "rolling_forcing",
    ("framewise-2step.pt", ""): "causal_forcing_framewise_2step",
    ("framewise-1step.pt", ""): "causal_forcing_framewise_1step",
    ("model.pt", "autoregressive_checkpoint"): "causvid",
    ("longlive_base.pt", ""): "longlive",
    ("rewardforcing.pt", ""): "reward_forcing",
    ("ema_model.pt", ""): "infinite_forcing",
    ("krea-realtime-video-14b.safetensors", ""): "krea_14b",
    ("shotstream_merged.pt", ""): "shotstream",
    ("rolling_forcing_dmd.pt", ""): "rolling_forcing",
    **{(f"wan2.1_t2v_{size}_{dtype}.safetensors", ""): "wan_t2v"
       for size in ("1.3b", "14b") for dtype in ("fp16", "bf16", "fp8_e4m3fn")},
}  # fmt: skip


def preset_for(
    path: str | Path, metadata: Mapping[str, str], config: ModelConfig, source: str = ""
) -> Preset:
    """Return the preset of a transformer file; its `recognised_by` says how it was found.

    What a file of ours states in its metadata wins (`ValueError` if it is malformed), then the
    file names that the families publish, then `self_forcing`. `source` is the key that the weights
    lay under.
    """
    own = own_fields(metadata)
    if own.keys() & _FIELD_TYPES.keys():
        return _stated(own)
    path = Path(path)
    name, folder = path.name.lower(), path.parent.name.lower()
    for key in ((name, folder), (name, "")):
        if key in _FILES:
            return replace(PRESETS[_FILES[key]], recognised_by=f"its file name, {path.name}")
    if name == "causal_forcing.pt":
        # Both variants have this name; only the framewise one was saved with an EMA.
        found = "causal_forcing_framewise" if source == "generator_ema" else "causal_forcing"
        return replace(PRESETS[found], recognised_by=f"its file name and key {source or 'none'!r}")
    size = f"width {config.dim}, {config.layers} layers"
    return replace(PRESETS[DEFAULT], recognised_by=f"nothing but its shapes ({size}): the default")


def own_fields(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what a file of ours states about itself: the JSON under `sneakpeek`, `sneakpeek.*`."""
    stated: dict[str, Any] = {}
    try:
        stated.update(json.loads(metadata.get("sneakpeek", "{}")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError("metadata key sneakpeek is not a JSON object; save it again") from error
    if "sneakpeek.preset" in metadata:
        stated["preset"] = metadata["sneakpeek.preset"]
    return stated


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "preset": (str,),
    **dict.fromkeys(("chunk", "sink", "trained_span"), (int,)),
    **dict.fromkeys(("window", "steps"), (int, type(None))),
    **dict.fromkeys(("shift", "cfg", "fps"), (int, float)),
    "warp": (bool,),
    "guidance": (dict, type(None)),
    "timesteps": (list,),
    "first_timesteps": (list, type(None)),
    **dict.fromkeys(("solver", "positions", "source", "licence", "refusal"), (str,)),
}


def stated_fields(preset: Preset) -> dict[str, Any]:
    """Return what a file must state in its metadata so that `preset_for` gives this preset."""
    fields = asdict(preset)
    return {"preset": preset.name} | {key: fields[key] for key in _FIELD_TYPES if key != "preset"}


def _stated(own: Mapping[str, Any]) -> Preset:
    for key in own.keys() & _FIELD_TYPES.keys():
        if type(own[key]) not in _FIELD_TYPES[key]:
            raise ValueError(
                f"{key} {own[key]!r} in the metadata must be "
                f"{' or '.join(t.__name__ for t in _FIELD_TYPES[key])}"
            )
    base = own.get("preset", DEFAULT)
    if base not in PRESETS:
        raise ValueError(f"preset {base!r} in the metadata is unknown; known: {', '.join(PRESETS)}")
    changes = {key: own[key] for key in _FIELD_TYPES if key in own and key != "preset"}
    if isinstance(changes.get("guidance"), dict):
        changes["guidance"] = _guidance(changes["guidance"])
    for key in ("timesteps", "first_timesteps"):
        if isinstance(changes.get(key), list):
            if not all(type(t) in (int, float) for t in changes[key]):
                raise ValueError(f"{key} {changes[key]!r} in the metadata must be numbers")
            changes[key] = tuple(float(t) for t in changes[key])
    return replace(PRESETS[base], **changes, recognised_by="the file's metadata")


def _guidance(stated: Mapping[str, Any]) -> FutureGuidance:
    try:
        return FutureGuidance(**stated)
    except (TypeError, ValueError) as error:
        raise ValueError(f"guidance {dict(stated)!r} in the metadata: {error}") from error
