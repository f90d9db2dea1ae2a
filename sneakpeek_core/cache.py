"""The dual-region KV cache: clean history (past) and keyframes (future), for all layers at once.

Storage is allocated once. Slots lie on one axis, future first, so that whatever a pass attends to
is one contiguous slice:

    | ... keyframe keyframe | past past past ... | open chunk | free |

Keys are kept after their norm and *before* RoPE, each with the latent frame it belongs to; once a
chunk they are rotated into a scratch of the same shape at the positions the policy gives. Which
frames are held is one tuple, replaced in one assignment by `commit`: whatever happens before it
leaves no trace. Only the sampler calls `commit`.

Legend: `sneakpeek_core.shapes`; S tokens of one latent frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .model.rope import Rope, rope_for, rotate
from .policy import POLICIES, CachePolicy, Content

PARTS = 3  # keys, rotated keys, values


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Sizes of one cache; known, in bytes too, before anything is allocated."""

    layers: int
    heads: int
    head_dim: int
    rows: int  # tokens of a latent frame, downwards
    columns: int  # and across
    past: int  # latent frames, the open chunk included
    future: int  # keyframes
    batch: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def tokens_per_frame(self) -> int:
        return self.rows * self.columns

    @property
    def bytes_per_frame(self) -> int:
        """Bytes of one latent frame in the cache: keys, rotated keys and values of all layers."""
        values = self.batch * self.tokens_per_frame * self.heads * self.head_dim * self.layers
        return PARTS * values * self.dtype.itemsize

    @property
    def past_bytes(self) -> int:
        return self.past * self.bytes_per_frame

    @property
    def future_bytes(self) -> int:
        return self.future * self.bytes_per_frame

    @property
    def total_bytes(self) -> int:
        return self.past_bytes + self.future_bytes


class Keyframe(NamedTuple):
    """One keyframe of the future region."""

    frame: int  # the latent frame it stands for
    step: int
    sigma: float  # noise level its keys were made at
    source: str  # "predicted" or "given"
    waypoint: bool  # stands in for a step end beyond the trained span
    version: int  # of the schedule it was planned for


class _Held(NamedTuple):
    frame: int
    slot: int


class Settled(NamedTuple):
    """What a policy has decided about a finished chunk, not yet in effect."""

    held: tuple[_Held, ...]
    first: int  # slot of the chunk's first frame
    rewritten: Mapping[int, Content]  # by frame


class Segment(NamedTuple):
    """`frames` neighbouring slots from `slot` on, written from frame `start` of a call on."""

    slot: int
    start: int
    frames: int


class KVCache:
    """Keys and values of both regions. Created by the caller, advanced only by the sampler.

    Order of calls for a chunk: `arrange`, any number of passes over a `view`, then `commit`.
    """

    def __init__(self, spec: CacheSpec, device: torch.device | str = "cpu"):
        self.spec = spec
        shape = (
            spec.layers, spec.batch, spec.future + spec.past,
            spec.tokens_per_frame, spec.heads, spec.head_dim,
        )  # fmt: skip
        # Hosts run under inference mode; tensors made in it could not be written outside.
        with torch.inference_mode(False):
            self.keys = torch.zeros(shape, dtype=spec.dtype, device=device)
            self.rotated = torch.zeros_like(self.keys)
            self.values = torch.zeros_like(self.keys)
        self.future: tuple[Keyframe, ...] = ()
        self._held: tuple[_Held, ...] = ()
        self._epoch = 0  # rises when slots change hands: views from before are void
        # The position each slot of `rotated` is valid for; None where it must be made again.
        self._turned: list[float | None] = [None] * (spec.future + spec.past)

    @property
    def frames(self) -> tuple[int, ...]:
        """The latent frames of the past region, oldest first."""
        return tuple(held.frame for held in self._held)

    @property
    def device(self) -> torch.device:
        return self.keys.device

    # -- one chunk -------------------------------------------------------------------------------

    def arrange(self, past: Sequence[float], future: Sequence[float]) -> None:
        """Bring held frames together and rotate what is not yet at its position.

        `past` and `future` are the temporal positions of the held frames and of the keyframes.
        Can be interrupted at any point and called again.
        """
        self._compact()
        self._rotate(self.spec.future, past)
        self._rotate(self.spec.future - len(self.future), future)

    def view(
        self, chunk: int, keyframes: int = 0, *, write_keyframes: bool = False,
        keep: bool = False, strength: float = 1.0,
    ) -> CacheView:  # fmt: skip
        """Return what one pass sees and writes: the past, an open chunk, some keyframes.

        The first `chunk` frames of the call are the open chunk (0 for a planning pass). The
        newest `keyframes` slots of the future region are visible; with `write_keyframes` the
        frames behind the chunk are those keyframes and are written there, else they hold what the
        last plan wrote. `keep` stores keys before RoPE too, as the last pass over frames that
        stay must. `strength` multiplies the attention weight of keyframes.
        """
        assert keyframes <= self.spec.future, f"{keyframes} keyframes, {self.spec.future} slots"
        past = self.spec.future
        first, open_slot = past - keyframes, past + len(self._held)
        stop = open_slot + chunk
        if stop > past + self.spec.past:
            raise ValueError(
                f"the cache has {self.spec.past} latent frames of which {len(self._held)} are "
                f"taken: a chunk of {chunk} does not fit"
            )
        writes = [Segment(open_slot, 0, chunk)] if chunk else []
        if write_keyframes:
            writes.insert(0, Segment(first, chunk, keyframes))
        bias = None  # where it would change nothing: masks keep attention off its fast kernels
        if keyframes and strength != 1.0:
            bias = self._bias(chunk, keyframes, stop - first, write_keyframes, strength)
        return CacheView(self, first, stop, tuple(writes), keep, bias)

    def drop_plan(self) -> None:
        """Forget the keyframes; their slots may be written from now on."""
        self.future = ()
        self._epoch += 1

    def commit_plan(self, keyframes: Sequence[Keyframe]) -> None:
        """Take in the keyframes that a pass with `keep=True` has just written."""
        self._epoch += 1
        self.future = tuple(keyframes)
        self._turned[: self.spec.future] = [None] * self.spec.future

    def settle(self, frames: Sequence[int], policy: CachePolicy, chunk: int) -> Settled:
        """Let the policy say what stays of the past and the open chunk's `frames`.

        The context pass must have written them (`keep=True`). `chunk` is the size of the next
        chunk, for which room is left. Changes nothing: `commit` does.
        """
        first = self.spec.future + len(self._held)
        held = self._held + tuple(_Held(f, first + i) for i, f in enumerate(frames))
        kept = set(policy.keep([h.frame for h in held], chunk))
        evicted = tuple(h.frame for h in held if h.frame not in kept)
        on_evict = POLICIES[policy.policy].on_evict
        rewritten: Mapping[int, Content] = {}
        if evicted and on_evict is not None:
            slots = {h.frame: h.slot for h in held}
            rewritten = on_evict(
                lambda frame: (self.keys[:, :, slots[frame]], self.values[:, :, slots[frame]]),
                evicted,
            )
        return Settled(tuple(h for h in held if h.frame in kept), first, rewritten)

    def commit(self, settled: Settled) -> None:
        """Take what was settled into the past."""
        slots = {h.frame: h.slot for h in settled.held}
        for frame, (keys, values) in settled.rewritten.items():
            self.keys[:, :, slots[frame]] = keys
            self.values[:, :, slots[frame]] = values
            self._turned[slots[frame]] = None
        for slot in range(settled.first, self.spec.future + self.spec.past):
            self._turned[slot] = None
        self._held = settled.held
        self._epoch += 1

    def grow(self, past: int) -> None:
        """Make room for `past` latent frames in all, for a stream that became longer."""
        if past <= self.spec.past:
            return
        larger = KVCache(replace(self.spec, past=past), self.device)
        size = self.keys.shape[2]
        for part in ("keys", "rotated", "values"):
            getattr(larger, part)[:, :, :size] = getattr(self, part)
        larger._turned[:size] = self._turned
        self._epoch += 1
        self.spec, self._turned = larger.spec, larger._turned
        self.keys, self.rotated, self.values = larger.keys, larger.rotated, larger.values

    # -- freezing --------------------------------------------------------------------------------

    def contents(self) -> tuple[Tensor, Tensor]:
        """Return keys (before RoPE) and values of keyframes and held frames, [L,B,F,S,N,D]."""
        self._compact()
        first = self.spec.future - len(self.future)
        stop = self.spec.future + len(self._held)
        return self.keys[:, :, first:stop], self.values[:, :, first:stop]

    def fill(
        self, frames: Sequence[int], future: Sequence[Keyframe], keys: Tensor, values: Tensor
    ) -> None:
        """Put frozen contents into an empty cache. They are copied."""
        assert not self._held and not self.future, "fill() needs an empty cache"
        first = self.spec.future - len(future)
        stop = first + keys.shape[2]
        self.keys[:, :, first:stop] = keys.to(self.keys)
        self.values[:, :, first:stop] = values.to(self.values)
        self.commit_plan(future)
        self._held = tuple(_Held(f, self.spec.future + i) for i, f in enumerate(frames))

    # -- inside ----------------------------------------------------------------------------------

    def _compact(self) -> None:
        """Move held frames to the front of the past region, one at a time.

        A frame's new slot is always free, and the table is renewed after every move: there is no
        moment at which the cache does not hold what it says it holds.
        """
        for order, held in enumerate(self._held):
            slot = self.spec.future + order
            if held.slot == slot:
                continue
            self.keys[:, :, slot] = self.keys[:, :, held.slot]
            self.values[:, :, slot] = self.values[:, :, held.slot]
            self._turned[slot] = None
            self._epoch += 1
            self._held = (
                *self._held[:order], held._replace(slot=slot), *self._held[order + 1 :],
            )  # fmt: skip

    def _rotate(self, first: int, positions: Sequence[float]) -> None:
        stale = [i for i, p in enumerate(positions) if self._turned[first + i] != p]
        for start, stop in _runs(stale):
            slots = slice(first + start, first + stop)
            rope = self.rope(positions[start:stop])
            for layer in range(self.spec.layers):
                keys = self.keys[layer, :, slots]
                turned = rotate(keys.flatten(1, 2), rope)
                self.rotated[layer, :, slots] = turned.unflatten(1, keys.shape[1:3])
            self._turned[slots] = list(positions[start:stop])

    def rope(self, positions: Sequence[float]) -> Rope:
        """Return the rotation of the tokens of frames at temporal `positions`."""
        return rope_for(
            positions, self.spec.rows, self.spec.columns,
            head_dim=self.spec.head_dim, device=self.device,
        )  # fmt: skip

    def _bias(
        self, chunk: int, keyframes: int, frames: int, queried: bool, strength: float
    ) -> Tensor:
        """Return log(strength) on what the open chunk sees of keyframes, 0 elsewhere.

        [1, 1, 1, Tk], or [1, 1, Tq, Tk] when the keyframes themselves are queries behind the
        chunk: how they are planned must not depend on how strongly they are followed.
        """
        size = self.spec.tokens_per_frame
        rows = (chunk + keyframes) * size if queried and chunk else 1
        bias = torch.zeros(rows, frames * size, dtype=self.spec.dtype, device=self.device)
        bias[: chunk * size if rows > 1 else 1, : keyframes * size] = math.log(strength)
        return bias[None, None]


class CacheView:
    """What one forward reads and writes: an `Extend` for `model.forward.velocity`."""

    def __init__(
        self, cache: KVCache, first: int, stop: int, writes: tuple[Segment, ...], keep: bool,
        bias: Tensor | None,
    ):  # fmt: skip
        self._cache = cache
        self._first, self._stop = first, stop
        self._writes = writes
        self._keep = keep
        self._bias = bias
        self._epoch = cache._epoch

    def __call__(
        self, layer: int, k_BTND: Tensor, v_BTND: Tensor, rope: Rope
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        cache, size = self._cache, self._cache.spec.tokens_per_frame
        if cache._epoch != self._epoch:  # as a recomputation in backward would find it
            raise RuntimeError("this view of the cache is void: the cache has moved on since")
        rotated = rotate(k_BTND, rope)
        k, r, v = (t.unflatten(1, (-1, size)) for t in (k_BTND, rotated, v_BTND))
        if torch.is_grad_enabled():
            joined = (self._joined(cache.rotated[layer], r), self._joined(cache.values[layer], v))
            self._write(layer, k.detach(), r.detach(), v.detach())
        else:
            self._write(layer, k, r, v)
            slots = slice(self._first, self._stop)
            joined = (cache.rotated[layer, :, slots], cache.values[layer, :, slots])
        return joined[0].flatten(1, 2), joined[1].flatten(1, 2), self._bias

    def _write(self, layer: int, k: Tensor, r: Tensor, v: Tensor) -> None:
        cache = self._cache
        for slot, start, count in self._writes:
            slots, frames = slice(slot, slot + count), slice(start, start + count)
            cache.rotated[layer, :, slots] = r[:, frames]
            cache.values[layer, :, slots] = v[:, frames]
            if self._keep:
                cache.keys[layer, :, slots] = k[:, frames]

    def _joined(self, stored: Tensor, made: Tensor) -> Tensor:
        """Concatenate stored and new frames in slot order: the differentiable way to extend.

        In-place writes would sever the new keys' gradients; history is always detached.
        """
        parts, at = [], self._first
        for slot, start, count in self._writes:
            parts += [stored[:, at:slot].detach(), made[:, start : start + count]]
            at = slot + count
        parts.append(stored[:, at : self._stop].detach())
        return torch.cat([p.to(made.dtype) for p in parts], dim=1)


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Group ascending integers into neighbouring runs [start, stop)."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs
