"""The chunk loop: plan keyframes, denoise a chunk, run the context pass, advance the cache.

Future-guided self-forcing as this project reconstructs it: Self Forcing's rollout (algorithm 1)
with a future region. The sampler does not know that frames or words exist: it moves latents, and
asks a `Conditioning` what each latent frame is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import CacheView, Keyframe, KVCache
from .conditioning import Conditioning
from .denoiser import Branch, Denoiser, KnownTexts
from .guidance import Target, targets
from .model.rope import Rope
from .noise import NoiseSource, seeded_noise
from .policy import Placement
from .settings import SamplerSettings
from .shapes import LATENT_CHANNELS
from .sigmas import renoise


@dataclass(frozen=True)
class _Call:
    """The frames of one network call: what they are told, where they lie, what they see."""

    rope: Rope
    branches: list[Branch]
    given: Mapping[int, Tensor]  # clean latents [B or 1, C, 1, H, W] of frames that are not noise

    @property
    def frames(self) -> int:
        return len(self.branches[0].texts)

    def sigmas(self, sigma: float) -> list[float]:
        return [0.0 if i in self.given else sigma for i in range(self.frames)]

    def pinned(self, x: Tensor) -> Tensor:
        """Return `x` with the given frames put back to their clean latents."""
        if self.given:
            x = x.clone()
            for index, latents in self.given.items():
                x[:, :, index : index + 1] = latents
        return x


class Rollout:
    """A generation at a chunk boundary: its caches, how far it has come, what comes next.

    The order for every chunk is `make` (its latents can leave at once), then `commit` (the
    context pass). Either can be interrupted by any exception and called again: nothing that lasts
    has changed before its last line. Both raise `FloatingPointError` when the model gives NaN.

    `caches` holds one cache, or a second one for the negative text with `cfg` above 1.
    `latent_size` is (height, width) in latent cells. `before_pass` is called before every forward
    and may raise, to interrupt.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        caches: Sequence[KVCache],
        settings: SamplerSettings,
        latent_size: tuple[int, int],
        *,
        noise: NoiseSource | None = None,
        before_pass: Callable[[], None] = lambda: None,
    ):
        self.denoiser = denoiser
        self.caches = tuple(caches)
        self.settings = settings
        self.latent_size = latent_size
        self.noise = noise or seeded_noise(settings.seeds)
        self.before_pass = before_pass
        self.chunk = 0  # chunks committed, given ones included
        self.frontier = 0  # latent frames committed
        self.planned_at = -1  # the chunk for which the current keyframes were planned
        self._texts: KnownTexts = {}  # of this generation: the weights do not change within it
        self.keyframe_latents: Tensor | None = None  # [B, C, K, H, W], what the model foresees

    def make(self, conditioning: Conditioning) -> Tensor:
        """Denoise the next chunk and return its clean latents [B, C, F, H, W], float32."""
        wanted = self._targets(conditioning)
        self._keep_texts(conditioning, wanted)
        joint = self._guided and self._guidance.mode == "joint"
        if not joint and self._is_stale(conditioning, wanted):
            self._plan(conditioning, wanted)
        return _finite(self._denoise(conditioning, wanted if joint else ()))

    def commit(self, latents_BCFHW: Tensor, conditioning: Conditioning) -> None:
        """Run the context pass over clean latents and take them into the past.

        Generated and given latents (a start image) alike. The past never sees the future region.
        """
        frames = range(self.frontier, self.frontier + latents_BCFHW.shape[2])
        sigma = self.settings.context_sigma
        clean = latents_BCFHW.to(self._device, torch.float32)
        if sigma:
            clean = renoise(clean, sigma, self._draw("context", 1, len(frames))[0])
        rope = self._arrange(frames)
        call = self._call(conditioning, frames, rope, lambda c: c.view(len(frames), keep=True))
        _finite(self._pass(call, clean, sigma))
        policy, chunk = self.settings.policy, self.settings.chunk
        settled = [cache.settle(frames, policy, chunk) for cache in self.caches]
        for cache, result in zip(self.caches, settled, strict=True):
            cache.commit(result)
        self.chunk += 1
        self.frontier += len(frames)

    def replan(self, conditioning: Conditioning) -> None:
        """Plan keyframes as `make` would: a replay needs the plan without the chunk."""
        self._plan(conditioning, self._targets(conditioning))

    # -- the future region -----------------------------------------------------------------------

    @property
    def _guided(self) -> bool:
        return self.settings.keyframes > 0

    @property
    def _guidance(self):
        guidance = self.settings.guidance
        assert guidance is not None
        return guidance

    def _targets(self, conditioning: Conditioning) -> tuple[Target, ...]:
        if not self._guided:
            return ()
        past, first = self._placement()
        oldest = past[0] if past else first
        reach = int(oldest + self.settings.span - 1 - first)
        return targets(
            conditioning.timeline, self.frontier, reach, self._guidance, conditioning.goal_steps
        )

    def _is_stale(self, conditioning: Conditioning, wanted: Sequence[Target]) -> bool:
        """Say whether keyframes must be planned before the next chunk.

        They must when there are none, the schedule has changed, one has been reached, a goal
        image has come within the span, or a refresh is due.
        """
        held = self.caches[0].future
        if not held or not wanted:
            return bool(held or wanted)
        refresh = self._guidance.refresh
        seen = {key.frame for key in held if key.source == "given"}
        return (
            any(key.version != conditioning.version for key in held)
            or any(key.frame < self.frontier for key in held)
            or any(wanted[i].frame not in seen for i in _given(conditioning, wanted))
            or (refresh > 0 and self.chunk - self.planned_at >= refresh)
        )

    def _plan(self, conditioning: Conditioning, wanted: Sequence[Target]) -> None:
        """Denoise keyframes that see the past alone, then write them as chunks will see them."""
        for cache in self.caches:
            cache.drop_plan()
        self.keyframe_latents = None
        if not wanted:
            return
        frames = [target.frame for target in wanted]
        given = _given(conditioning, wanted)
        rope = self._arrange([], frames)
        call = self._call(
            conditioning, frames, rope,
            lambda c: c.view(0, len(frames), write_keyframes=True, keep=True), given,
        )  # fmt: skip
        if len(given) < len(frames):
            sigmas = _thinned(self.settings.sigmas, self._guidance.plan_passes)
            latents = self._solve(sigmas, [call] * (len(sigmas) - 1))
        else:
            latents = torch.cat([given[i] for i in range(len(frames))], dim=2)
            latents = latents.expand(self._batch, -1, -1, -1, -1).to(self._device, torch.float32)
        shown = self._guidance.context_sigma
        x = renoise(latents, shown, self._draw("shown", 1, len(frames))[0]) if shown else latents
        _finite(self._pass(call, call.pinned(x), shown))
        keyframes = [
            Keyframe(
                target.frame, target.step, sigma, "given" if i in given else "predicted",
                target.waypoint, conditioning.version,
            )
            for i, (target, sigma) in enumerate(zip(wanted, call.sigmas(shown), strict=True))
        ]  # fmt: skip
        for cache in self.caches:
            cache.commit_plan(keyframes)
        self.keyframe_latents = latents
        self.planned_at = self.chunk

    # -- the open chunk --------------------------------------------------------------------------

    def _denoise(self, conditioning: Conditioning, joint: Sequence[Target] = ()) -> Tensor:
        """Denoise the open chunk; `joint` keyframes are denoised in the same calls."""
        size = self.settings.chunk
        frames = list(range(self.frontier, self.frontier + size))
        ahead = [target.frame for target in joint]
        keyframes = len(joint) or len(self.caches[0].future)
        plain_rope = self._arrange(frames)
        plain = guided = self._call(conditioning, frames, plain_rope, lambda c: c.view(size))
        if keyframes:
            guided = self._call(
                conditioning, frames + ahead,
                self._arrange(frames, ahead) if ahead else plain_rope,
                lambda c: c.view(
                    size, keyframes,
                    write_keyframes=bool(ahead), strength=self._guidance.strength,
                ),
                {size + i: goal for i, goal in _given(conditioning, joint).items()},
            )  # fmt: skip
        settings = self.settings
        first = self.frontier == 0 and settings.first_sigmas is not None
        sigmas = settings.first_sigmas if first and settings.first_sigmas else settings.sigmas
        passes = len(sigmas) - 1
        until = passes
        if keyframes and self._guidance.first_passes is not None:
            until = self._guidance.first_passes
        calls = [guided if index < until else plain for index in range(passes)]
        latents = self._solve(sigmas, calls, size)
        if ahead:
            self.keyframe_latents = latents[:, :, size:]
        return latents[:, :, :size]

    def _solve(self, sigmas: Sequence[float], calls: Sequence[_Call], chunk: int = 0) -> Tensor:
        """Denoise from noise, one call a level: `chunk` frames, and keyframes behind them.

        Frames that a later call leaves out keep their last estimate, so the result has the frames
        of the first call.
        """
        # A chunk's noise is the same whatever keyframes are denoised along with it.
        sizes = {"chunk": chunk, "keyframe": calls[0].frames - chunk}
        drawn = [self._draw(kind, len(calls), size) for kind, size in sizes.items() if size]
        noise = [torch.cat(parts, dim=2) for parts in zip(*drawn, strict=True)]
        x, left = calls[0].pinned(noise[0]), noise[0][:, :, :0]
        for index, call in enumerate(calls):
            sigma, below = sigmas[index], sigmas[index + 1]
            x = x[:, :, : call.frames]
            denoised = self._pass(call, x, sigma)
            if below == 0.0:
                x = denoised
            elif self.settings.solver == "euler":
                x = denoised + (below / sigma) * (x - denoised)
            else:
                x = renoise(denoised, below, noise[index + 1][:, :, : call.frames])
            x = call.pinned(x)
            if index + 1 < len(calls) and calls[index + 1].frames < call.frames:
                left = call.pinned(denoised)[:, :, calls[index + 1].frames :]
        return torch.cat([x, left], dim=2)

    # -- what every call needs -------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return self.caches[0].device

    @property
    def _batch(self) -> int:
        return self.caches[0].spec.batch

    def _placement(self) -> Placement:
        return self.settings.policy.place(self.caches[0].frames, self.frontier)

    def _arrange(self, frames: Sequence[int], ahead: Sequence[int] = ()) -> Rope:
        """Bring the caches to this chunk's positions; return the rotation of the call's frames."""
        past, first = self._placement()

        def position(frame: int) -> float:
            return first + frame - self.frontier

        for cache in self.caches:
            cache.arrange(past, [position(key.frame) for key in cache.future])
        return self.caches[0].rope([position(frame) for frame in (*frames, *ahead)])

    def _call(
        self,
        conditioning: Conditioning,
        frames: Sequence[int],
        rope: Rope,
        view: Callable[[KVCache], CacheView],
        given: Mapping[int, Tensor] | None = None,
    ) -> _Call:
        texts = [conditioning.text_of(frame) for frame in frames]
        branches = [Branch(texts, view(self.caches[0]), self._texts)]
        if len(self.caches) > 1:
            assert conditioning.negative is not None, "cfg above 1 needs a negative text"
            negative = [conditioning.negative] * len(texts)
            branches.append(Branch(negative, view(self.caches[1]), self._texts))
        on_device = {i: x.to(self._device, torch.float32) for i, x in (given or {}).items()}
        return _Call(rope, branches, on_device)

    def _pass(self, call: _Call, x: Tensor, sigma: float) -> Tensor:
        self.before_pass()
        return self.denoiser(x, call.sigmas(sigma), call.rope, call.branches, self.settings.cfg)

    def _draw(self, kind: str, count: int, frames: int) -> list[Tensor]:
        """Draw all the noise of a loop at once: copies to the device stay out of its passes."""
        shape = (LATENT_CHANNELS, frames, *self.latent_size)
        drawn = [self.noise(kind, self.chunk, index, shape) for index in range(count)]
        return list(torch.stack(drawn).to(self._device).unbind(0))

    def _keep_texts(self, conditioning: Conditioning, wanted: Sequence[Target]) -> None:
        """Forget what texts cost that are no longer in sight."""
        chunk = range(self.frontier, self.frontier + self.settings.chunk)
        frames = (*chunk, *(target.frame for target in wanted))
        texts = {id(conditioning.text_of(frame)) for frame in frames} | {id(conditioning.negative)}
        for key in self._texts.keys() - texts:
            del self._texts[key]


def _finite(x: Tensor) -> Tensor:
    """Return what a pass gave, or raise `FloatingPointError`: NaN must not stay in the cache.

    Waits for the device, once for all that a chunk's passes computed.
    """
    if not bool(torch.isfinite(x).all()):
        raise FloatingPointError("the model gave NaN or infinity")
    return x


def _given(conditioning: Conditioning, wanted: Sequence[Target]) -> dict[int, Tensor]:
    """Return the goal latents of the targets that are the end of a step with a goal image."""
    ends = conditioning.timeline.ends
    return {
        index: goal
        for index, target in enumerate(wanted)
        if (goal := conditioning.goals[target.step]) is not None
        and target.frame == ends[target.step] - 1
    }


def _thinned(sigmas: Sequence[float], passes: int | None) -> tuple[float, ...]:
    """Pick `passes` evenly spaced levels: noise levels stay ones the model was made for."""
    own = len(sigmas) - 1
    if passes is None or passes >= own:
        return tuple(sigmas)
    return (*(sigmas[round(i * own / passes)] for i in range(passes)), 0.0)
