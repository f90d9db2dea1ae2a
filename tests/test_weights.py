"""Files of weights: every wrapping loads, every other kind of file is refused in words."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sneakpeek_core.denoiser import Branch, Denoiser
from sneakpeek_core.model.checkpoint import bare_name, choose, read_checkpoint
from sneakpeek_core.model.config import ModelConfig
from sneakpeek_core.model.inspect import describe
from sneakpeek_core.model.recognise import recognise
from sneakpeek_core.model.rope import rope_for, rotate
from sneakpeek_core.model.weights import (
    KIND,
    load_transformer,
    load_vae,
    random_transformer,
    random_vae,
    read_tensors,
    save_model,
    weights_fingerprint,
)
from tests.weight_files import SMALL, UNSUPPORTED, shapes_of, write_header

GOLDEN = Path(__file__).parent / "data/self_forcing/weights.safetensors"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_transformer(SMALL, seed=0).state_dict()


# -- wrapping and nesting


@pytest.mark.parametrize(
    "wrap",
    [
        "{}",
        "model.{}",
        "model._fsdp_wrapped_module.{}",
        "_orig_mod.model.{}",
        "model.diffusion_model.{}",
        "diffusion_model.{}",
        "net.{}",
        "_checkpoint_wrapped_module.model.{}",
    ],
)
def test_every_wrapper_loads_the_same_model(wrap: str, state: dict[str, Tensor], tmp_path: Path):
    wrapped = {wrap.format(name): tensor for name, tensor in state.items()}
    save_file(wrapped | {wrap.format("freqs"): torch.zeros(4)}, tmp_path / "a.safetensors")
    loaded = load_transformer(tmp_path / "a.safetensors").tree.state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_wrappers_in_the_middle_of_a_name_are_removed():
    name = "model._fsdp_wrapped_module.blocks.3._checkpoint_wrapped_module.ffn._orig_mod.0.weight"
    assert bare_name(name) == "blocks.3.ffn.0.weight"


@pytest.mark.parametrize(
    ("nest", "source"),
    [
        (lambda s, x: s, ""),
        (lambda s, x: {"generator": x, "generator_ema": s, "critic": x}, "generator_ema"),
        (lambda s, x: {"generator": s, "critic": x, "step": 3}, "generator"),
        (lambda s, x: {"model": s, "state_dict": x}, "model"),
        (lambda s, x: {"state_dict": {"generator": s, "critic": x}}, "state_dict/generator"),
        (lambda s, x: {"anything": s}, "anything"),
        (lambda s, x: {"generator_ema": {}, "generator": s}, "generator"),
        (lambda s, x: {"step": 7, "lr": 0.1, **s}, ""),
    ],
)
def test_the_preferred_dict_of_a_torch_file_is_taken(
    nest, source: str, state: dict[str, Tensor], tmp_path: Path
):
    other = {"model.blocks.0.modulation": torch.ones(1)}
    torch.save(nest({f"model.{n}": t for n, t in state.items()}, other), tmp_path / "a.pt")
    model = load_transformer(tmp_path / "a.pt")
    assert model.source == source
    assert torch.equal(model.tree.head.modulation, state["head.modulation"])


def test_a_file_of_several_models_gives_its_transformer(state: dict[str, Tensor], tmp_path: Path):
    whole = {f"model.diffusion_model.{n}": t for n, t in state.items()}
    save_file(whole | {"vae.conv1.weight": torch.zeros(3)}, tmp_path / "a.safetensors")
    assert load_transformer(tmp_path / "a.safetensors").config == SMALL


def test_two_names_that_become_one_are_refused(state: dict[str, Tensor], tmp_path: Path):
    twice = {"head.modulation": torch.ones(1), "model.head.modulation": torch.ones(1)}
    save_file(twice, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a.safetensors: two tensors are called head.modulation"):
        read_tensors(tmp_path / "a.safetensors")


def test_loading_casts_and_leaves_nothing_unloaded(state: dict[str, Tensor], tmp_path: Path):
    save_model(tmp_path / "a.safetensors", state)
    tree = load_transformer(tmp_path / "a.safetensors", dtype=torch.bfloat16).tree
    assert {p.dtype for p in tree.parameters()} == {torch.bfloat16}
    assert not any(p.is_meta or p.requires_grad for p in tree.parameters())


def test_metadata_comes_back_and_states_the_text_length(state: dict[str, Tensor], tmp_path: Path):
    stated = {KIND: "transformer", "sneakpeek": {"text_len": 32, "preset": "tiny"}, "commit": "ab"}
    save_model(tmp_path / "a.safetensors", state, stated)
    model = load_transformer(tmp_path / "a.safetensors")
    assert (model.metadata["commit"], model.config.text_len) == ("ab", 32)
    assert (model.preset.name, model.preset.recognised_by) == ("tiny", "the file's metadata")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_golden_weights_load():
    model = load_transformer(GOLDEN)
    assert model.config == ModelConfig(dim=256, ffn_dim=512, layers=2, text_dim=64)
    assert model.preset.name == "self_forcing" and "default" in model.preset.recognised_by


def test_choosing_stops_at_a_bounded_depth():
    tree: dict = {"w": torch.ones(1)}
    for _ in range(10):
        tree = {"state_dict": tree}
    assert choose(tree) == ({}, "state_dict/state_dict/state_dict/state_dict")


def test_a_checkpoint_says_what_was_removed(state: dict[str, Tensor], tmp_path: Path):
    torch.save({"generator": {f"model.{n}": t for n, t in state.items()}}, tmp_path / "a.pt")
    checkpoint = read_checkpoint(tmp_path / "a.pt")
    assert (checkpoint.source, checkpoint.wrappers) == ("generator", ("model.",))
    assert recognise(shapes_of(checkpoint.tensors)).problem == ""


# -- files that are not what they should be


def test_incomplete_and_foreign_tensors_are_listed(state: dict[str, Tensor], tmp_path: Path):
    wrong = {n: t for n, t in state.items() if not n.startswith("blocks.1.ffn")}
    wrong |= {"blocks.0.extra": torch.ones(2), "head.modulation": torch.ones(3)}
    save_file(wrong, tmp_path / "a.safetensors")
    with pytest.raises(ValueError) as error:
        load_transformer(tmp_path / "a.safetensors")
    text = str(error.value)
    assert text.startswith("a.safetensors: missing: blocks.1.ffn.0.bias, blocks.1.ffn.0.weight")
    assert "unexpected: blocks.0.extra;" in text
    assert "head.modulation [3], not [1, 2, 128]" in text
    assert "a Wan 2.1 text-to-video transformer" in text


def test_integer_weights_are_refused(state: dict[str, Tensor], tmp_path: Path):
    save_file({**state, "head.head.weight": state["head.head.weight"].to(torch.int8)},
              tmp_path / "a.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match=r"quantised: head.head.weight; use an fp16 or bf16 file"):
        load_transformer(tmp_path / "a.safetensors")


class RunsCode:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path):
    torch.save({"generator": {"w": torch.ones(2)}, "x": RunsCode(tmp_path / "ran")},
               tmp_path / "a.pt")  # fmt: skip
    with pytest.raises(ValueError, match=r"unsafe pickle.*system.*convert it to safetensors"):
        read_tensors(tmp_path / "a.pt")
    assert "unsafe pickle" in describe(tmp_path / "a.pt").problem
    (tmp_path / "b.pt").write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
    with pytest.raises(ValueError, match="before 2020"):
        read_tensors(tmp_path / "b.pt")
    assert not (tmp_path / "ran").exists()


def test_missing_files_and_folders_are_named(tmp_path: Path):
    for read in (read_tensors, load_transformer, load_vae, describe):
        with pytest.raises(ValueError, match="does not exist"):
            read(tmp_path / "no.safetensors")
        with pytest.raises(ValueError, match="is a folder"):
            read(tmp_path)


def test_a_view_larger_than_its_file_is_refused(tmp_path: Path):
    torch.save({"w": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="tensor w is larger than the file"):
        read_tensors(tmp_path / "a.pt")


def test_torch_files_without_named_tensors_are_refused(tmp_path: Path):
    torch.save([torch.ones(1)], tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds a list, not named tensors"):
        read_tensors(tmp_path / "a.pt")
    torch.save({"step": 3}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="holds no tensors"):
        read_tensors(tmp_path / "b.pt")


# -- the VAE


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae.", "model."])
def test_a_vae_loads_whatever_its_width_and_prefix(prefix: str, tmp_path: Path):
    vae = random_vae(8, seed=1)
    torch.save({f"{prefix}{n}": t for n, t in vae.state_dict().items()}, tmp_path / "vae.pth")
    loaded = load_vae(tmp_path / "vae.pth")
    assert loaded.dim == 8 and not any(p.is_meta for p in loaded.parameters())
    assert torch.equal(loaded.conv1.weight, vae.conv1.weight)
    assert describe(tmp_path / "vae.pth").sizes == "base width 8, 16 channels"


def test_other_vaes_and_other_files_are_refused_as_vae(tmp_path: Path):
    for case, words in (("vae22", "Wan 2.2 VAE.*48 channels"), ("lora", "a LoRA, not a Wan 2.1")):
        write_header(tmp_path / "a.safetensors", UNSUPPORTED[case][0])
        with pytest.raises(ValueError, match=rf"a.safetensors: this looks like .*{words}"):
            load_vae(tmp_path / "a.safetensors")


def test_the_random_vae_is_alive():
    latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        video, _ = random_vae(8, seed=1).decode_step(latents, None)
        again, _ = random_vae(8, seed=1).decode_step(latents, None)
    assert video.isfinite().all() and 1e-3 < video.std() < 100 and torch.equal(video, again)


# -- random weights


def test_random_weights_depend_on_the_seed_alone(state: dict[str, Tensor]):
    before = torch.random.get_rng_state()
    again, other = random_transformer(SMALL, seed=0), random_transformer(SMALL, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(t, state[n]) for n, t in again.state_dict().items())
    assert not torch.equal(other.head.modulation, again.head.modulation)
    assert all(t.std() > 0 for t in state.values())


@torch.no_grad()
def test_random_weights_react_to_text_time_and_neighbouring_frames():
    denoiser = Denoiser(random_transformer(SMALL, seed=0), text_len=8)
    rope = rope_for((0.0, 1.0), 2, 2, head_dim=128)
    rng = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 1, 16, 2, 4, 4, generator=rng)
    text, edited = torch.randn(2, 1, 5, SMALL.text_dim, generator=rng)

    def first_frame(x: Tensor, sigma: float, text: Tensor) -> Tensor:
        branch = Branch([text] * 2, lambda layer, k, v, rope: (rotate(k, rope), v, None), {})
        return denoiser.flow(x, torch.tensor([[sigma, 0.5]]), rope, [branch])[:, :, :1]

    base = first_frame(x, 0.5, text)
    assert base.isfinite().all() and 0.3 < base.std() < 3
    neighbour = torch.cat([x[:, :, :1], other[:, :, 1:]], 2)
    for changed in (first_frame(x, 0.5, edited), first_frame(x, 0.7, text),
                    first_frame(neighbour, 0.5, text)):  # fmt: skip
        assert (changed - base).std() > 0.01


# -- fingerprints


def test_a_fingerprint_names_the_content_not_the_form(state: dict[str, Tensor]):
    name = weights_fingerprint(state)
    assert len(name) == 32
    forms = [
        dict(reversed(state.items())),
        {f"model._fsdp_wrapped_module.{n}": t for n, t in state.items()} | {"freqs": torch.ones(1)},
        {n: t.bfloat16() for n, t in state.items()},
        {n: t.bfloat16().float() for n, t in state.items()},
        {n: t.double() for n, t in state.items()},
    ]
    assert {weights_fingerprint(form) for form in forms} == {name}


def test_a_fingerprint_changes_with_every_sampled_value_name_and_shape():
    names = {weights_fingerprint({"w": torch.zeros(251)})}
    for i in range(251):
        w = torch.zeros(251)
        w[i] = 1
        names.add(weights_fingerprint({"w": w}))
    names.add(weights_fingerprint({"v": torch.zeros(251)}))
    names.add(weights_fingerprint({"w": torch.zeros(1, 251)}))
    names.add(weights_fingerprint({"w": torch.zeros(251), "v": torch.zeros(0)}))
    assert len(names) == 255


def test_a_fingerprint_samples_all_columns_and_sees_a_merged_lora():
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    down = torch.randn(1, 512, generator=torch.Generator().manual_seed(1))
    assert weights_fingerprint({"w": w}) != weights_fingerprint({"w": w + down * 0.1})
    for size in (128, 256, 512, 1536):  # a stride of whole rows would miss half of the columns
        half = torch.zeros(size, size)
        half[:, size // 2 :] = 1
        zeros = torch.zeros(size, size)
        assert weights_fingerprint({"w": half}) != weights_fingerprint({"w": zeros})


def test_the_loaded_file_has_the_fingerprint_of_the_file():
    in_file = weights_fingerprint(load_file(GOLDEN))
    for dtype in (torch.float32, torch.bfloat16):
        tree = load_transformer(GOLDEN, dtype=dtype).tree
        assert weights_fingerprint(tree.state_dict()) == in_file
