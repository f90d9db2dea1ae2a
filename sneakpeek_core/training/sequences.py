"""Batches of stage 1: laid-out videos with their noise, what the model is told of it, and texts.

Legend: B batch, C channels, F frames of the sequence (see `layout`), H height, W width; K texts
of a row, L tokens of a text, D text width.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..model.parallel import frame_mask
from .cuts import Video, cut, ends_of
from .layout import (
    Layout,
    LayoutRecipe,
    Place,
    SketchRecipe,
    draw_layout,
    padded,
    sketch_layout,
)
from .recipe import check_shares


@dataclass(frozen=True, kw_only=True)
class NoiseRecipe:
    """Noise levels of everything. Shares are probabilities, levels are sigmas in [0, 1]."""

    clean_context: float = 0.4  # share of sequences whose past is told to be clean
    context_sigma: float = 0.2  # most noise on the past of the others, as they are told
    hidden: float = 0.05  # most noise that the model is not told of, on what it made itself
    clean_guides: float = 0.35  # share of plans whose guides are told to be clean
    guide_sigma: float = 0.4  # most noise on the guides of the others
    given: float = 0.25  # share of plans with goal images: pictures encoded alone, exact

    def __post_init__(self) -> None:
        check_shares(self, *(field.name for field in fields(self)))


class Videos(Protocol):
    """Encoded videos, as `latent_set.LatentSet` gives them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Video: ...

    def text(self, sentence: str) -> Tensor:
        """Return a sentence's embedding [L, D]."""
        ...


class Batch(NamedTuple):
    """What one forward takes. `positions` are temporal, in latent frames."""

    x_BCFHW: Tensor
    flow_BCFHW: Tensor
    sigmas_BF: Tensor
    positions_BF: Tensor
    weights_BF: Tensor  # of each frame in the loss; 0 for what is not learned
    kinds_BF: Tensor  # index into KINDS, for the log
    mask_BFF: Tensor
    texts_BKLD: Tensor
    text_bias_BFKL: Tensor
    sources_BF: Tensor  # the place that predicts what a frame shows of its own work; -1: none


KINDS = ("unguided", "guided", "key")


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Makes batches of videos."""

    layout: LayoutRecipe
    noise: NoiseRecipe
    keyframe_weight: float
    shift: float  # warps the levels of what is learned
    span: int
    text_len: int
    videos: Videos
    positions: str = "absolute"  # of the past, as the sampler's cache policy gives them
    own_past: float = 0.0  # share of sequences whose past is the model's own, and of plans

    def batch(
        self, numbers: Sequence[int], rng: random.Random, sketch: SketchRecipe | None = None
    ) -> Batch:
        """Return videos by their numbers as one batch: a function of them and of `rng`.

        With `sketch` they are sketches: the ends of their steps alone.
        """
        videos = [cut(self.videos[number], self.span, rng) for number in numbers]
        layouts = [
            sketch_layout(ends_of(video), sketch, rng) if sketch
            else draw_layout(ends_of(video), self.layout, rng, self.positions)
            for video in videos
        ]  # fmt: skip
        length = max(len(layout.places) for layout in layouts)
        layouts = [padded(layout, length) for layout in layouts]
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        rows = [
            self._row(video, layout, rng, generator)
            for video, layout in zip(videos, layouts, strict=True)
        ]
        masks = [frame_mask(layout.frames, layout.kept) for layout in layouts]
        texts, bias = self._texts(videos, layouts)
        x, flow, sigmas, positions, weights, kinds, sources = (
            torch.stack(parts) for parts in zip(*rows, strict=True)
        )
        mask = torch.stack(masks)
        return Batch(x, flow, sigmas, positions, weights, kinds, mask, texts, bias, sources)

    def _row(
        self, video: Video, layout: Layout, rng: random.Random, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """Return x, flow, sigmas, positions, weights, kinds, sources of one sequence."""
        numbers = torch.tensor([place.frame for place in layout.places])
        clean = video.latents.float()[:, numbers]  # [C, F, H, W]
        told, real = self._levels(layout, rng)
        # of a video that was cut, the last step has no end
        ends = {end - 1: index for index, end in enumerate(ends_of(video)[: len(video.ends)])}
        kinds = [_kind(place) for place in layout.places]
        given = self._given(layout, set(ends), rng)
        for index in given:
            clean[:, index] = video.ends[ends[layout.places[index].frame]].float()
            told[index] = real[index] = 0.0
            kinds[index] = -1
        sigmas = torch.tensor(real)[None, :, None, None]
        drawn = torch.randn(clean.shape, generator=generator)
        copies = [place.moved_to is not None for place in layout.places]
        drawn[:, copies] = drawn[:, :1]  # of the start, which comes first
        x = (1 - sigmas) * clean + sigmas * drawn
        learned = {-1: 0.0, KINDS.index("key"): self.keyframe_weight}
        weights = torch.tensor([learned.get(kind, 1.0) for kind in kinds])
        sources = torch.tensor(self._sources(layout, kinds, rng))
        sources[given] = -1
        return (
            x, drawn - clean, torch.tensor(told),
            torch.tensor([place.position for place in layout.places]),
            weights, torch.tensor(kinds), sources,
        )  # fmt: skip

    def _sources(self, layout: Layout, kinds: Sequence[int], rng: random.Random) -> list[int]:
        """Return for each place the one where its frame is predicted, or -1 to show the truth.

        A whole past is drawn at once, and all guides of a plan. A guide is its plan's target
        (group - 1); a past frame was an open one, in a sketch a target.
        """
        found = [-1] * len(layout.places)
        if not self.own_past:
            return found
        learned = [(i, place) for i, place in enumerate(layout.places) if kinds[i] >= 0]
        targets = {(p.group, p.frame): i for i, p in learned if p.role == "target"}
        predicted = {frame: i for (_, frame), i in targets.items()}
        predicted |= {p.frame: i for i, p in learned if p.role == "open"}
        drawn: dict[tuple[str, int], bool] = {}
        for index, place in enumerate(layout.places):
            if not _own_work(place):
                continue
            guide = place.role == "guide"
            key = (place.role, place.group if guide else 0)
            if key not in drawn:
                drawn[key] = rng.random() < self.own_past
            if drawn[key]:
                found[index] = (
                    targets.get((place.group - 1, place.frame), -1) if guide
                    else predicted.get(place.frame, -1)
                )  # fmt: skip
        return found

    def _levels(self, layout: Layout, rng: random.Random) -> tuple[list[float], list[float]]:
        """Return the noise levels that the model is told, and those that frames really have.

        Told of a clean past, the sampler's model sees its own work, which is not exact.
        """
        noise = self.noise
        past = 0.0 if rng.random() < noise.clean_context else rng.uniform(0, noise.context_sigma)
        drawn: dict[tuple[str, int], float] = {}
        hidden: dict[tuple[str, int], float] = {}
        told, real = [], []
        for place in layout.places:
            key = (place.role, place.group)
            if key not in drawn:
                drawn[key] = past if place.role == "clean" else self._level(place, rng)
                hidden[key] = rng.uniform(0, noise.hidden) if _own_work(place) else 0.0
            told.append(drawn[key])
            real.append(max(drawn[key], hidden[key]))
        return told, real

    def _level(self, place: Place, rng: random.Random) -> float:
        noise = self.noise
        if place.role == "guide":
            clean = rng.random() < noise.clean_guides
            return 0.0 if clean else rng.uniform(0, noise.guide_sigma)
        u = rng.random()
        return self.shift * u / (1 + (self.shift - 1) * u)

    def _given(self, layout: Layout, ends: set[int], rng: random.Random) -> list[int]:
        """Return the places of goal images: among guides, and beside targets that see them."""
        plans: dict[int, list[int]] = {}
        for place in layout.places:
            if place.role == "guide":
                plans.setdefault(place.group, []).append(place.frame)
        found: set[tuple[str, int, int]] = set()
        for group, frames in plans.items():
            able = [frame for frame in frames if frame in ends]
            if not able or rng.random() >= self.noise.given:
                continue
            chosen = rng.sample(able, rng.randint(1, len(able)))
            found |= {("guide", group, frame) for frame in chosen}
            if len(chosen) < len(frames):  # the others are predicted, and see these
                found |= {("target", group - 1, frame) for frame in chosen}
        return [
            index
            for index, place in enumerate(layout.places)
            if (place.role, place.group, place.frame) in found
        ]

    def _texts(self, videos: Sequence[Video], layouts: Sequence[Layout]) -> tuple[Tensor, Tensor]:
        """Return the rows' texts side by side, and what each frame sees of them.

        Wan pads a prompt with zeros to its full length without a mask. Equal tokens have equal
        keys, so one zero token with the logarithm of their number as its bias is the same.
        """
        embeds = [[self.videos.text(text)[: self.text_len] for text, _ in v.steps] for v in videos]
        count = max(len(row) for row in embeds)
        tokens = 1 + max(len(text) for row in embeds for text in row)
        texts = torch.zeros(len(videos), count, tokens, embeds[0][0].shape[-1])
        bias = torch.full((len(videos), len(layouts[0].places), count, tokens), -math.inf)
        for row, (sentences, layout) in enumerate(zip(embeds, layouts, strict=True)):
            seen = torch.full((count, tokens), -math.inf)
            for index, text in enumerate(sentences):
                texts[row, index, : len(text)] = text
                seen[index, : len(text)] = 0.0
                if len(text) < self.text_len:
                    seen[index, len(text)] = math.log(self.text_len - len(text))
            for place_index, place in enumerate(layout.places):
                bias[row, place_index, place.step] = seen[place.step]
        return texts, bias


def _own_work(place: Place) -> bool:
    """Say whether a frame that is shown is, in the sampler, one that the model made itself.

    A start picture (group 0) is not.
    """
    return place.role == "guide" or (place.role == "clean" and place.group > 0)


def _kind(place: Place) -> int:
    if place.role == "target":
        return KINDS.index("key")
    if place.role == "open":
        return KINDS.index("guided" if place.guided else "unguided")
    return -1
