"""The VAE equals diffusers', streams without seams, and never loses its place.

Legend: B batch, C channels, F frames or latent frames, H height, W width.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sneakpeek_core.vae.streaming import (
    StreamingDecoder,
    StreamingEncoder,
    decode_peak_bytes,
    decode_video,
    decoder_state_bytes,
    encode_image,
    encode_video,
    posterior,
)
from sneakpeek_core.vae.wan import (
    LATENT_MEAN,
    LATENT_STD,
    State,
    WanVAE,
    to_model_space,
    to_vae_space,
    vae_dim,
)

PARITY = 2e-5  # seen: 4.1e-6 in frames of [0, 1], 9.5e-7 in latents
SEAM = 1e-5  # seen: 3.6e-6 in frames, 8.4e-7 in latents; oneDNN rounds by the number of frames
CONFIGS = [(8, 5, 7, 1), (8, 6, 9, 2), (16, 3, 4, 2), (16, 5, 2, 1)]  # dim, height, width, batch
SPLITS = [(1,) * 6, (3, 3), (1, 3, 2), (2, 4), (6,)]


def random_vae(dim: int, seed: int = 0) -> WanVAE:
    """Return a VAE none of whose parameters has the value that its constructor gives."""
    torch.manual_seed(seed)
    vae = WanVAE(dim)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("gamma"):
                parameter.normal_(1.0, 0.3)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    return vae


def diffusers_key(key: str) -> str:
    """Return the name in `AutoencoderKLWan` of a tensor of a Wan 2.1 checkpoint."""

    def upsample(match: re.Match[str]) -> str:
        block, layer = divmod(int(match[1]), 4)
        return f"up_blocks.{block}." + ("upsamplers.0." if layer == 3 else f"resnets.{layer}.")

    for pattern, name in (
        (r"^conv1\.", "quant_conv."),
        (r"^conv2\.", "post_quant_conv."),
        (r"coder\.conv1\.", "coder.conv_in."),
        (r"head\.0\.", "norm_out."),
        (r"head\.2\.", "conv_out."),
        (r"residual\.0\.", "norm1."),
        (r"residual\.2\.", "conv1."),
        (r"residual\.3\.", "norm2."),
        (r"residual\.6\.", "conv2."),
        (r"shortcut\.", "conv_shortcut."),
        (r"middle\.0\.", "mid_block.resnets.0."),
        (r"middle\.1\.", "mid_block.attentions.0."),
        (r"middle\.2\.", "mid_block.resnets.1."),
        (r"downsamples\.", "down_blocks."),
    ):
        key = re.sub(pattern, name, key)
    return re.sub(r"upsamples\.(\d+)\.", upsample, key)


def reference(vae: WanVAE) -> AutoencoderKLWan:
    """Return diffusers' VAE with the same weights: every tensor of either has one of the other."""
    other = AutoencoderKLWan(base_dim=vae.dim)
    weights = {diffusers_key(key): tensor for key, tensor in vae.state_dict().items()}
    assert len(weights) == len(vae.state_dict())
    other.load_state_dict(weights, strict=True)
    return other


def decode_split(vae: WanVAE, latents_BCFHW: Tensor, split: Sequence[int]) -> Tensor:
    decoder = StreamingDecoder(vae, latent_frames_per_step=max(split))
    return torch.cat([decoder.decode(x) for x in latents_BCFHW.split(list(split), dim=2)], 1)


def encode_split(vae: WanVAE, frames_BFHWC: Tensor, split: Sequence[int]) -> Tensor:
    """Encode in calls of `split` latent frames."""
    encoder = StreamingEncoder(vae, latent_frames_per_step=max(split))
    lengths = [4 * n - 3 * (i == 0) for i, n in enumerate(split)]
    return torch.cat([encoder.encode(x) for x in frames_BFHWC.split(lengths, dim=1)], 2)


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.mark.parametrize(("dim", "height", "width", "batch"), CONFIGS)
def test_parity(dim: int, height: int, width: int, batch: int):
    """Whole and streamed, both directions equal diffusers' on random weights."""
    vae = random_vae(dim)
    other = reference(vae)
    latents_BCFHW = torch.randn(batch, 16, 6, height, width)
    frames_BFHWC = torch.rand(batch, 21, 8 * height, 8 * width, 3)
    with torch.no_grad():
        video_BCFHW = other.decode(to_vae_space(latents_BCFHW), return_dict=False)[0]
        theirs_BFHWC = (video_BCFHW.permute(0, 2, 3, 4, 1) + 1) / 2
        moments = other.encode(frames_BFHWC.permute(0, 4, 1, 2, 3) * 2 - 1, return_dict=False)[0]
        their_latents_BCFHW = to_model_space(moments.mean)

        mean_BCFHW, logvar_BCFHW = posterior(vae, frames_BFHWC)
        gaps = [gap(decode_video(vae, latents_BCFHW), theirs_BFHWC)]
        gaps += [gap(mean_BCFHW, their_latents_BCFHW)]
        std = torch.tensor(LATENT_STD).view(-1, 1, 1, 1)
        gaps += [gap((logvar_BCFHW / 2).exp() * std, moments.std)]
        gaps += [gap(decode_split(vae, latents_BCFHW, s), theirs_BFHWC) for s in SPLITS]
        gaps += [gap(encode_split(vae, frames_BFHWC, s), their_latents_BCFHW) for s in SPLITS]
    assert theirs_BFHWC.std() > 0.05  # the comparison is not of constants
    assert their_latents_BCFHW.std() > 0.01
    print("largest gap", max(gaps))
    assert max(gaps) < PARITY, gaps


def test_latent_statistics_are_wans():
    """The fixed mean and std are diffusers', and the two conversions undo each other."""
    config = AutoencoderKLWan(base_dim=8).config
    assert list(LATENT_MEAN) == config["latents_mean"]
    assert list(LATENT_STD) == config["latents_std"]
    latents_BCFHW = torch.randn(2, 16, 3, 4, 5)
    assert gap(to_model_space(to_vae_space(latents_BCFHW)), latents_BCFHW) < 1e-6


@pytest.mark.parametrize("split", SPLITS)
def test_streaming_equals_whole(split: tuple[int, ...]):
    """However a clip is cut, only rounding differs; the first latent frame gives one frame."""
    vae = random_vae(8)
    latents_BCFHW = torch.randn(1, 16, 6, 5, 7)
    with torch.no_grad():
        frames_BFHWC = decode_video(vae, latents_BCFHW, latent_frames_per_step=6)
        whole_BCFHW = encode_video(vae, frames_BFHWC, latent_frames_per_step=6)
    assert frames_BFHWC.shape == (1, 21, 40, 56, 3)
    assert frames_BFHWC.dtype == torch.float32
    assert frames_BFHWC.min() >= 0 and frames_BFHWC.max() <= 1
    assert gap(decode_split(vae, latents_BCFHW, split), frames_BFHWC) < SEAM
    assert gap(encode_split(vae, frames_BFHWC, split), whole_BCFHW) < SEAM


def test_an_image_is_a_clip_of_one_frame():
    """An image encoded alone equals the first latent frame of any clip that begins with it."""
    vae = random_vae(8)
    frames_BFHWC = torch.rand(2, 5, 16, 24, 3)
    with torch.no_grad():
        alone_BCFHW = encode_image(vae, frames_BFHWC[:, 0])
        assert alone_BCFHW.shape == (2, 16, 1, 2, 3)
        assert gap(alone_BCFHW, encode_video(vae, frames_BFHWC)[:, :, :1]) < SEAM


@contextmanager
def failing_at(vae: WanVAE, call: int) -> Iterator[list[int]]:
    """Raise in the `call`-th submodule that finishes; yields a list that grows by each call."""
    calls: list[int] = []

    def count(*_):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("injected")

    hooks = [module.register_forward_hook(count) for module in vae.modules()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def check_retries(vae: WanVAE, stream: StreamingDecoder | StreamingEncoder, call: Callable):
    """Fail all over the second of three calls; every retry must equal the undisturbed run."""

    def copy(state: State) -> list[Tensor]:
        return [x.clone() for x in state or ()]

    def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
        return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    call(0)
    before, values = stream.state, copy(stream.state)
    with failing_at(vae, call=0) as calls:
        undisturbed = call(1), call(2)
    total = len(calls) // 2
    for n in (1, total // 4, total // 2, 3 * total // 4, total - 1):
        stream.state = before
        with failing_at(vae, n), pytest.raises(RuntimeError, match="injected"):
            call(1)
        assert stream.state is before
        assert same(copy(before), values)
        assert same((call(1), call(2)), undisturbed), n


def test_a_failed_decode_changes_nothing():
    """An exception in any layer, also of a call's second step, leaves the decoder as it was."""
    vae = random_vae(8)
    decoder = StreamingDecoder(vae, latent_frames_per_step=2)
    chunks = torch.randn(1, 16, 9, 3, 4).split(3, dim=2)
    check_retries(vae, decoder, lambda i: decoder.decode(chunks[i]))


def test_a_failed_encode_changes_nothing():
    """An exception in any layer, also of a call's second step, leaves the encoder as it was."""
    vae = random_vae(8)
    encoder = StreamingEncoder(vae, latent_frames_per_step=2)
    chunks = torch.rand(1, 33, 24, 32, 3).split([9, 12, 12], dim=1)
    check_retries(vae, encoder, lambda i: encoder.encode(chunks[i]))


def test_state_can_be_set_back_and_reset():
    """A state that was read earlier returns the stream to that place; reset to the beginning."""
    vae = random_vae(8)
    decoder = StreamingDecoder(vae)
    first, second, third = torch.randn(1, 16, 6, 2, 3).split(2, dim=2)
    start_BFHWC = decoder.decode(first)
    held = decoder.state
    second_BFHWC = decoder.decode(second)
    decoder.decode(third)
    decoder.state = held
    assert torch.equal(decoder.decode(second), second_BFHWC)
    decoder.reset()
    assert torch.equal(decoder.decode(first), start_BFHWC)


@pytest.mark.parametrize(("dim", "height", "width", "batch"), CONFIGS)
def test_state_bytes_are_known_beforehand(dim: int, height: int, width: int, batch: int):
    """The size of the state is computed exactly, in any dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        decoder = StreamingDecoder(random_vae(dim).to(dtype))
        decoder.decode(torch.randn(batch, 16, 1, height, width))
        assert decoder.state is not None
        assert sum(x.nbytes for x in decoder.state) == decoder_state_bytes(
            dim, height, width, dtype_bytes=dtype.itemsize, batch=batch
        )


def test_memory_is_flat():
    """Over 50 chunks the states keep their size and own no more storage than they show."""
    vae = random_vae(8)
    decoder, encoder = StreamingDecoder(vae), StreamingEncoder(vae)
    sizes = set()
    for _ in range(50):
        frames_BFHWC = decoder.decode(torch.randn(1, 16, 2, 2, 2))
        encoder.encode(frames_BFHWC)
        tensors = (*(decoder.state or ()), *(encoder.state or ()))
        assert not any(x.requires_grad for x in tensors)
        sizes.add(sum(x.untyped_storage().nbytes() for x in tensors))
        assert sum(x.nbytes for x in tensors) in sizes
    assert len(sizes) == 1


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and the most there were."""

    def __init__(self, held: int):
        super().__init__()
        self.live = self.peak = held
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, pointer: int, size: int):
        self.known.discard(pointer)
        self.live -= size


@pytest.mark.parametrize(("dim", "height", "width", "frames"), [(96, 60, 104, 3), (16, 16, 12, 1)])
def test_peak_bytes_are_estimated(dim: int, height: int, width: int, frames: int):
    """The estimate is within a tenth of what the tensors of a decode step really take."""
    with torch.device("meta"), torch.no_grad():
        vae = WanVAE(dim)
        _, state = vae.decode_step(torch.empty(1, 16, 1, height, width), None)
        latents_BCFHW = torch.empty(1, 16, frames, height, width)
        with LiveBytes(decoder_state_bytes(dim, height, width)) as count:
            vae.decode_step(latents_BCFHW, state)
    estimate = decode_peak_bytes(dim, height, width, latent_frames=frames)
    assert estimate == pytest.approx(count.peak, rel=0.1)


def test_gradients_are_diffusers():
    """Training through a whole clip reaches every parameter with the reference's gradient."""
    vae = random_vae(8)
    with torch.no_grad():
        vae.get_parameter("decoder.head.2.weight").mul_(0.1)  # their clamp must cut no gradient
    other = reference(vae)
    frames_BFHWC = torch.rand(2, 9, 16, 24, 3)
    target_BFHWC = torch.rand(2, 9, 16, 24, 3)

    def loss(out_BFHWC: Tensor, logvar_BCFHW: Tensor) -> Tensor:
        return (out_BFHWC - target_BFHWC).square().mean() + logvar_BCFHW.mean()

    mean_BCFHW, logvar_BCFHW = posterior(vae, frames_BFHWC, latent_frames_per_step=2)
    out_BFHWC = decode_video(vae, mean_BCFHW, latent_frames_per_step=2, clamp=False)
    assert out_BFHWC.min() > 0 and out_BFHWC.max() < 1
    loss(out_BFHWC, logvar_BCFHW).backward()

    moments = other.encode(frames_BFHWC.permute(0, 4, 1, 2, 3) * 2 - 1, return_dict=False)[0]
    their_BCFHW = other.decode(moments.mean, return_dict=False)[0]
    loss(their_BCFHW.permute(0, 2, 3, 4, 1) / 2 + 0.5, moments.logvar).backward()

    theirs = dict(other.named_parameters())
    for name, parameter in vae.named_parameters():
        expected = theirs[diffusers_key(name)].grad
        assert parameter.grad is not None and expected is not None, name
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-6, msg=name)


def test_every_grad_mode_gives_the_same():
    """Plain, no_grad and inference_mode agree, and a stream may go on in another mode."""
    vae = random_vae(8)
    latents_BCFHW = torch.randn(1, 16, 4, 2, 3)
    plain_BFHWC = decode_video(vae, latents_BCFHW)
    assert plain_BFHWC.requires_grad
    decoder = StreamingDecoder(vae)
    with torch.inference_mode():
        parts = [decoder.decode(latents_BCFHW[:, :, :2])]
    parts += [decoder.decode(latents_BCFHW[:, :, 2:])]
    assert gap(torch.cat(parts, 1), plain_BFHWC.detach()) < SEAM


def test_half_precision_weights_take_and_give_float32():
    """The weights' dtype decides how it is computed, not what goes in and out."""
    vae = random_vae(8)
    latents_BCFHW = torch.randn(1, 16, 3, 3, 4)
    frames_BFHWC = StreamingDecoder(vae).decode(latents_BCFHW)
    half = random_vae(8).bfloat16()
    half_BFHWC = StreamingDecoder(half).decode(latents_BCFHW)
    assert half_BFHWC.dtype == StreamingEncoder(half).encode(half_BFHWC).dtype == torch.float32
    assert gap(half_BFHWC, frames_BFHWC) < 0.05


def test_dim_is_read_from_shapes():
    """The width of a VAE is found from its tensors, and other files are refused in words."""
    shapes = {key: tuple(x.shape) for key, x in WanVAE(24).state_dict().items()}
    assert vae_dim(shapes) == 24
    assert shapes["encoder.downsamples.0.residual.0.gamma"] == (24, 1, 1, 1)
    assert shapes["decoder.middle.1.norm.gamma"] == (96, 1, 1)
    for wrong in ({}, {**shapes, "decoder.conv1.weight": (96, 48, 3, 3, 3)}):
        with pytest.raises(ValueError, match=r"not a Wan 2.1 VAE: .* choose a"):
            vae_dim(wrong)


def test_bad_input_is_told_the_fix():
    """Shapes that cannot go on raise before anything is computed, and say what can."""
    vae = random_vae(8)
    encoder, decoder = StreamingEncoder(vae), StreamingDecoder(vae)

    def refused(call: Callable[[Tensor], Tensor], shape: tuple[int, ...], fix: str):
        with pytest.raises(ValueError, match=fix):
            call(torch.zeros(shape))

    refused(encoder.encode, (1, 4, 16, 16, 3), "4n[+]1; use 1 or 5")
    refused(encoder.encode, (1, 5, 20, 16, 3), "height 20 is not a multiple of 8; use 16")
    refused(encoder.encode, (1, 5, 16, 3, 3), "width 3 is not a multiple of 8; use 8")
    refused(encoder.encode, (1, 5, 16, 16, 4), "RGB without alpha")
    refused(decoder.decode, (1, 48, 1, 2, 2), "use latents of a Wan 2.1 model")
    refused(decoder.decode, (1, 16, 0, 2, 2), "give at least 1")
    assert encoder.state is None and decoder.state is None

    encoder.encode(torch.zeros(1, 1, 16, 16, 3))
    decoder.decode(torch.zeros(1, 16, 1, 2, 2))
    refused(encoder.encode, (1, 5, 16, 16, 3), "give 4 or 8")
    refused(encoder.encode, (1, 4, 16, 24, 3), "clip of 16x16, batch 1; reset")
    refused(decoder.decode, (2, 16, 1, 2, 2), "clip of 2x2, batch 1; reset")


def test_modules_remember_nothing():
    """The tree holds parameters only: no buffer, no attribute that a step leaves behind."""
    vae = random_vae(8)
    before = [set(vars(module)) for module in vae.modules()]
    StreamingDecoder(vae).decode(torch.zeros(1, 16, 2, 2, 2))
    assert [set(vars(module)) for module in vae.modules()] == before
    assert not list(vae.buffers())
    assert all(isinstance(x, nn.Parameter) for x in vae.state_dict(keep_vars=True).values())
