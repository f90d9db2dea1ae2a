"""Wan 2.1's video VAE with the checkpoint's own names, as one causal step per direction.

`step(x, state) -> (y, new_state)`: a clip may be cut anywhere, because the state holds the last
frames that each causal layer saw. A state is a value: modules keep nothing, steps change nothing.
Latents at this boundary are model-space (normalised), pixels are BCFHW in [-1, 1].

Legend: B batch, C channels, F frames or latent frames, H height, W width. Activations are laid out
channels-last: norms then read whole rows, and folding frames into the batch copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..processor import has_bf16
from ..shapes import LATENT_CHANNELS

State = tuple[Tensor, ...] | None  # None: nothing was coded yet

# Per-channel statistics of Wan 2.1 latents, as in diffusers' AutoencoderKLWan config
LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)

WIDTHS = (1, 2, 4, 4)  # channels of each level, in units of `dim`
HALVES_TIME = (False, True, True)  # does the downsampler after level i halve time as well?
HISTORY = 2  # frames that a causal convolution of three taps looks back
LOGVAR_RANGE = (-30.0, 20.0)


def _statistics(like: Tensor) -> tuple[Tensor, Tensor]:
    # Made anew: a buffer would be no checkpoint key, and would stay behind on the meta device.
    mean, std = (like.new_tensor(x).view(-1, 1, 1, 1) for x in (LATENT_MEAN, LATENT_STD))
    return mean, std


def to_model_space(z_BCFHW: Tensor) -> Tensor:
    """Return VAE-space latents as the normalised ones that the transformer is trained on."""
    mean, std = _statistics(z_BCFHW)
    return (z_BCFHW - mean) / std


def to_vae_space(latents_BCFHW: Tensor) -> Tensor:
    """Return model-space latents as the VAE-space ones that its layers are trained on."""
    mean, std = _statistics(latents_BCFHW)
    return latents_BCFHW * std + mean


def vae_dim(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return `dim` of the Wan 2.1 VAE whose tensors have these shapes; `ValueError` for others."""
    first = tuple(shapes.get("encoder.conv1.weight", ()))
    latent = tuple(shapes.get("decoder.conv1.weight", ()))
    dim = first[0] if first else 0
    if first != (dim, 3, 3, 3, 3) or latent != (WIDTHS[-1] * dim, LATENT_CHANNELS, 3, 3, 3):
        raise ValueError(
            "not a Wan 2.1 VAE: encoder.conv1.weight is "
            f"{first or 'missing'}, decoder.conv1.weight is {latent or 'missing'}; expected "
            "(dim, 3, 3, 3, 3) and (4 dim, 16, 3, 3, 3); choose a Wan 2.1 VAE file"
        )
    return dim


class _Past:
    """The frames that causal layers saw before this step, and those they hand to the next one.

    Layers ask in the order they run, which is the order of the tensors in a state.
    """

    def __init__(self, state: State):
        self.first = state is None
        self._before = iter(state or ())
        self._after: list[Tensor] = []

    def extend(self, x_BCFHW: Tensor, frames: int = HISTORY, *, zeros: bool = True) -> Tensor:
        """Return `x_BCFHW` behind the layer's last `frames`: at first zeros, or nothing."""
        if not self.first:
            # the host may have moved the weights since the last step
            x_BCFHW = torch.cat([next(self._before).to(x_BCFHW), x_BCFHW], 2)
        elif zeros:
            x_BCFHW = F.pad(x_BCFHW, (0, 0, 0, 0, frames, 0))
        # a clone, because a view would keep the whole activation alive
        self._after.append(x_BCFHW[:, :, -frames:].clone())
        return x_BCFHW

    def state(self) -> State:
        """Return the state after the step."""
        return tuple(self._after)


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` that uses oneDNN for small CPU inputs too.

    For a single clip of few values torch chooses a kernel that is up to 15 times slower
    (`use_mkldnn` in aten/src/ATen/native/Convolution.cpp). Padding is never causal here.
    """

    def forward(self, input: Tensor) -> Tensor:
        mkldnn = torch.backends.mkldnn
        native = input.dtype == torch.float32 or (input.dtype == torch.bfloat16 and has_bf16())
        plain = input.device.type == "cpu" and native
        # the direct call has no derivative
        if plain and not torch.is_grad_enabled() and mkldnn.enabled and mkldnn.is_available():
            padding = tuple(int(p) for p in self.padding)
            return torch.mkldnn_convolution(
                input, self.weight, self.bias, padding, self.stride, self.dilation, 1
            )
        return super().forward(input)


def _causal_conv(channels: int, out_channels: int) -> Conv3d:
    return Conv3d(channels, out_channels, 3, padding=(0, 1, 1))


def _norm(x: Tensor, gamma: Tensor) -> Tensor:
    # Wan divides by max(|x|, 1e-12); this eps differs from that only below 1e-11.
    return F.rms_norm(x, gamma.shape, gamma, eps=1e-24)


def _norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    return F.silu(_norm(x, gamma), inplace=True)


class RMSNorm(nn.Module):
    """Norm over channels. Gamma has one trailing axis for each of (frames,) height and width.

    With `silu` the activation that follows is part of it: `compute` works on rows of channels and
    can be replaced by a compiled one, which is what training spends a third of its time on.
    """

    def __init__(self, dim: int, axes: int = 3, *, silu: bool = False):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))
        self.compute = _norm_silu if silu else _norm

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x.movedim(1, -1), self.gamma.flatten()).movedim(-1, 1)


def compile_norms(vae: WanVAE) -> None:
    """Compile every norm with its activation into one kernel, for training."""
    compiled = torch.compile(_norm_silu, dynamic=True)
    for module in vae.modules():
        if isinstance(module, RMSNorm) and module.compute is _norm_silu:
            module.compute = compiled


def _run(layers: Iterable[nn.Module], x: Tensor, past: _Past) -> Tensor:
    for layer in layers:
        if isinstance(layer, Conv3d):
            x = past.extend(x)  # rebound, so that the shorter copy is freed before the convolution
        remembers = isinstance(layer, (ResidualBlock, Downsampler, Upsampler))
        x = layer(x, past) if remembers else layer(x)
    return x


def _per_frame(layer: Callable[[Tensor], Tensor], x_BCFHW: Tensor) -> Tensor:
    y = layer(rearrange(x_BCFHW, "b c f h w -> (b f) c h w"))
    return rearrange(y, "(b f) c h w -> b c f h w", b=x_BCFHW.shape[0])


class ResidualBlock(nn.Module):
    """Two causal convolutions beside a shortcut."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(channels, silu=True),
            nn.Identity(),  # the checkpoint counts the activation
            _causal_conv(channels, out_channels),
            RMSNorm(out_channels, silu=True),
            nn.Identity(),
            nn.Identity(),  # and a dropout
            _causal_conv(out_channels, out_channels),
        )
        same = channels == out_channels
        self.shortcut = nn.Identity() if same else Conv3d(channels, out_channels, 1)

    def forward(self, x: Tensor, past: _Past) -> Tensor:
        return _run(self.residual, x, past) + self.shortcut(x)


class AttentionBlock(nn.Module):
    """Attention with one head among the cells of each frame alone."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, axes=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + _per_frame(self._attend, x)

    def _attend(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x))
        q, k, v = rearrange(qkv, "n (three c) h w -> three n 1 (h w) c", three=3)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(attended, "n 1 (h w) c -> n c h w", h=x.shape[2]))


class Downsampler(nn.Module):
    """Halve height and width, and with `time` the frames after the clip's first."""

    def __init__(self, dim: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, past: _Past) -> Tensor:
        x = _per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        joined = past.extend(x, 1, zeros=False)
        if not past.first:
            return self.time_conv(joined)
        # The clip's first frame stays as it is; it is still the history of the next two.
        return torch.cat([x[:, :, :1], self.time_conv(joined)], 2) if x.shape[2] > 1 else x


class Upsampler(nn.Module):
    """Double height and width, and with `time` the frames after the clip's first."""

    def __init__(self, dim: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
            nn.Conv2d(dim, dim // 2, 3, padding=1),
        )
        self.time_conv = Conv3d(dim, 2 * dim, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, past: _Past) -> Tensor:
        if self.time_conv is not None:
            x = self._double_time(self.time_conv, x, past)
        return _per_frame(self.resample, x)

    def _double_time(self, time_conv: Conv3d, x: Tensor, past: _Past) -> Tensor:
        # For time_conv the clip begins at its second frame: the first is neither doubled nor seen.
        later = x[:, :, 1:] if past.first else x
        joined = past.extend(later)
        if not later.shape[2]:
            return x
        # written channels-last, hence not straight to b c (f two) h w
        pairs = rearrange(time_conv(joined), "b (two c) f h w -> b (f two) h w c", two=2)
        doubled = pairs.movedim(-1, 1)
        return torch.cat([x[:, :, :1], doubled], 2) if past.first else doubled


def _middle(dim: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


def _head(dim: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(RMSNorm(dim, silu=True), nn.Identity(), _causal_conv(dim, out_channels))


class Encoder(nn.Module):
    """Pixels to the moments of the posterior, before the last 1x1 convolution."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = _causal_conv(3, dim)
        layers: list[nn.Module] = []
        channels = dim
        for level, width in enumerate(WIDTHS):
            wide = width * dim
            layers += [ResidualBlock(channels, wide), ResidualBlock(wide, wide)]
            channels = wide
            if level < len(HALVES_TIME):
                layers.append(Downsampler(wide, HALVES_TIME[level]))
        self.downsamples = nn.Sequential(*layers)
        self.middle = _middle(channels)
        self.head = _head(channels, 2 * LATENT_CHANNELS)

    def forward(self, x: Tensor, past: _Past) -> Tensor:
        return _run((self.conv1, *self.downsamples, *self.middle, *self.head), x, past)


class Decoder(nn.Module):
    """Latents, after the first 1x1 convolution, to pixels."""

    def __init__(self, dim: int):
        super().__init__()
        channels = WIDTHS[-1] * dim
        self.conv1 = _causal_conv(LATENT_CHANNELS, channels)
        self.middle = _middle(channels)
        layers: list[nn.Module] = []
        for level, width in enumerate(reversed(WIDTHS)):
            wide = width * dim
            layers.append(ResidualBlock(channels, wide))
            layers += [ResidualBlock(wide, wide) for _ in range(2)]
            channels = wide
            if level < len(HALVES_TIME):
                layers.append(Upsampler(wide, HALVES_TIME[-1 - level]))
                channels = wide // 2
        self.upsamples = nn.Sequential(*layers)
        self.head = _head(channels, 3)

    def forward(self, x: Tensor, past: _Past) -> Tensor:
        return _run((self.conv1, *self.middle, *self.upsamples, *self.head), x, past)


class WanVAE(nn.Module):
    """The whole tree; `dim` is 96 in the released one. Its two steps are all that computes."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.encoder = Encoder(dim)
        self.conv1 = Conv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
        self.conv2 = Conv3d(LATENT_CHANNELS, LATENT_CHANNELS, 1)
        self.decoder = Decoder(dim)

    def encode_step(self, video_BCFHW: Tensor, state: State) -> tuple[tuple[Tensor, Tensor], State]:
        """Encode the next 4n frames of a clip, the first time 4n+1, of pixels in [-1, 1].

        Returns the posterior's (mean, logvar) in model space, float32, and the state after them.
        """
        past = _Past(state)
        x = video_BCFHW.to(self.conv1.weight).to(memory_format=torch.channels_last_3d)
        mean, logvar = self.conv1(self.encoder(x, past)).float().chunk(2, 1)
        _, std = _statistics(logvar)
        logvar = logvar.clamp(*LOGVAR_RANGE) - 2 * std.log()
        return (to_model_space(mean), logvar), past.state()

    def decode_step(self, latents_BCFHW: Tensor, state: State) -> tuple[Tensor, State]:
        """Decode the next latent frames of a clip to 4 frames each, the clip's first to one.

        Returns pixels BCFHW, meant for [-1, 1] but not clamped (training needs the gradient
        outside), in the weights' dtype, and the state after them.
        """
        past = _Past(state)
        z = to_vae_space(latents_BCFHW.float()).to(self.conv2.weight)
        z = self.conv2(z.to(memory_format=torch.channels_last_3d))
        return self.decoder(z, past), past.state()
