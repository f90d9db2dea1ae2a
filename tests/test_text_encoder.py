"""Text encoders: laws of the tiny one, and UMT5 against the library it comes from."""

from __future__ import annotations

import io
import logging
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sneakpeek_core.model.inspect import describe
from sneakpeek_core.model.weights import random_transformer, save_model
from sneakpeek_core.text_encoder import (
    TinyTextEncoder,
    load_text_encoder,
    random_text_encoder,
    save_text_encoder,
)
from sneakpeek_core.umt5 import UMT5TextEncoder, cleaned

TEXTS = ["put the red ball in the box", "", "move!", "把红球放进盒子里", "ΚΑΛΗΜΕΡΑ, κόσμε"]


@pytest.fixture(scope="module")
def tiny() -> TinyTextEncoder:
    return random_text_encoder(seed=0)


# -- the tiny encoder


@torch.no_grad()
def test_a_batch_equals_one_by_one(tiny: TinyTextEncoder):
    for together, text in zip(tiny(TEXTS), TEXTS, strict=True):
        alone = tiny([text])[0]
        assert together.shape == alone.shape and together.dtype == torch.float32
        assert torch.allclose(together, alone, atol=1e-5)


def test_shapes_and_scale(tiny: TinyTextEncoder):
    first, empty, short, chinese, greek = (e.detach() for e in tiny(TEXTS))
    assert (len(first), len(empty), len(short), len(greek)) == (7, 1, 2, 3)
    assert len(chinese) == 8  # one token a character
    assert first.shape[1] == 4096 and first.isfinite().all() and 0.1 < first.std() < 10
    assert tiny([]) == []


def test_words_matter_and_so_does_their_order_but_not_case(tiny: TinyTextEncoder):
    assert tiny.tokenize("The  Red\nball") == tiny.tokenize("the red ball")
    assert tiny.tokenize("red ball") != tiny.tokenize("blue ball")
    red, swapped = tiny(["red ball", "ball red"])
    assert not torch.allclose(red.flip(0), swapped, atol=1e-3)
    assert all(1 <= t < tiny.buckets for t in tiny.tokenize("any words, at all"))


@torch.no_grad()
def test_what_a_word_says_outweighs_where_it_stands(tiny: TinyTextEncoder):
    """Another word is another embedding; the same word stays itself wherever it stands."""
    red, blue, later = tiny(
        ["put the red ball in the box", "put the blue ball in the box", "now put the red ball away"]
    )
    assert (red[2] - blue[2]).norm() > red[2].norm()
    assert (red[2] - later[3]).norm() < 0.6 * red[2].norm()
    others = [i for i in range(7) if i != 2]
    assert (red - blue)[others].norm(dim=1).max() < 0.5 * red[2].norm()
    rows = torch.cat(tiny(["lift the green square", "open a cupboard", "whisk two eggs slowly"]))
    assert rows.mean(0).norm() < 0.8 * rows.norm(dim=1).mean()  # little that is in all of them


def test_long_texts_are_cut_with_a_warning(tiny: TinyTextEncoder, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(tiny.tokenize("word " * 600)) == 512
    assert "600 tokens is cut to 512" in caplog.text


def test_it_can_be_trained(tiny: TinyTextEncoder):
    encoder = random_text_encoder(seed=1, text_dim=8)
    sum(e.square().mean() for e in encoder(TEXTS)).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@torch.no_grad()
def test_it_round_trips_through_a_file(tmp_path: Path):
    encoder = random_text_encoder(seed=2, text_dim=64)
    save_text_encoder(tmp_path / "t.safetensors", encoder, {"trained_on": "nothing"})
    loaded = load_text_encoder(tmp_path / "t.safetensors")
    for a, b in zip(loaded(TEXTS), encoder(TEXTS), strict=True):
        assert torch.equal(a, b)
    half = load_text_encoder(tmp_path / "t.safetensors", dtype=torch.bfloat16)
    assert half(TEXTS)[0].dtype == torch.float32
    found = describe(tmp_path / "t.safetensors")
    assert (found.kind, found.metadata["trained_on"]) == ("text encoder", "nothing")


def test_the_seed_decides_and_the_global_state_is_untouched():
    before = torch.random.get_rng_state()
    a, b, c = (random_text_encoder(seed, text_dim=8).to_text.weight for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(before, torch.random.get_rng_state())


def test_other_files_are_refused_by_what_they_look_like(tmp_path: Path):
    from sneakpeek_core.model.config import ModelConfig

    config = ModelConfig(dim=128, ffn_dim=16, layers=1, text_dim=8)
    save_model(tmp_path / "a.safetensors", random_transformer(config, 0).state_dict())
    with pytest.raises(ValueError, match=r"a.safetensors: this looks like a Wan 2.1 text-to-video"):
        load_text_encoder(tmp_path / "a.safetensors")
    state = {n: t.clone() for n, t in random_text_encoder(0, 8).state_dict().items()}
    del state["norm.weight"]
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"not a whole tiny text encoder: missing: norm.weight"):
        load_text_encoder(tmp_path / "b.safetensors")


def test_without_transformers_the_message_names_the_extra(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    save_file({bias: torch.ones(32, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=re.escape('pip install "sneakpeek[umt5]"')):
        load_text_encoder(tmp_path / "a.safetensors")


def test_prompts_are_cleaned_as_wan_does():
    assert cleaned("  a &amp;amp; b\n\tc  ") == "a & b c"


# -- UMT5


@pytest.fixture(scope="module")
def spiece() -> bytes:
    """Train a sentencepiece model with UMT5's special tokens (pad 0, eos 1, unk 2)."""
    sentencepiece = pytest.importorskip("sentencepiece")
    words = "put move the red blue green ball box square to in left right whisk eggs pour pan &"
    lines = [" ".join(words.split()[i::3]) + " ." for i in range(3)] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=60, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="module")
def reference() -> Any:
    """A tiny random UMT5 encoder of transformers itself, in eval mode."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.UMT5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return transformers.UMT5EncoderModel(config).eval()


def state_of(reference: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in reference.state_dict().items()}


def wan_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename Hugging Face's tensors to Wan's, written independently of the code under test."""
    renamed = {"token_embedding.weight": state["shared.weight"],
               "norm.weight": state["encoder.final_layer_norm.weight"]}  # fmt: skip
    for i in range(2):
        attention, feed = f"encoder.block.{i}.layer.0.", f"encoder.block.{i}.layer.1."
        ours = {
            "norm1": f"{attention}layer_norm", "norm2": f"{feed}layer_norm",
            "pos_embedding.embedding": f"{attention}SelfAttention.relative_attention_bias",
            "ffn.gate.0": f"{feed}DenseReluDense.wi_0", "ffn.fc1": f"{feed}DenseReluDense.wi_1",
            "ffn.fc2": f"{feed}DenseReluDense.wo",
            **{f"attn.{c}": f"{attention}SelfAttention.{c}" for c in "qkvo"},
        }  # fmt: skip
        renamed |= {f"blocks.{i}.{new}.weight": state[f"{n}.weight"] for new, n in ours.items()}
    return renamed


def check_against(reference: Any, encoder: Any) -> None:
    """Hold every text equal to the reference model on the encoder's own token ids."""
    assert isinstance(encoder, UMT5TextEncoder)
    texts = ["put the red ball in the box", "", "whisk"]
    for text, embeds in zip(texts, encoder(texts), strict=True):
        ids = encoder.token_ids(text)
        assert ids[-1] == 1
        with torch.no_grad():
            expected = reference(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert embeds.dtype == torch.float32 and torch.allclose(embeds, expected, atol=1e-6)


def test_comfyuis_single_file(reference: Any, spiece: bytes, tmp_path: Path):
    state = state_of(reference)
    del state["encoder.embed_tokens.weight"]
    state["spiece_model"] = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    save_file(state, tmp_path / "umt5_xxl_fp16.safetensors")
    encoder = load_text_encoder(tmp_path / "umt5_xxl_fp16.safetensors")
    check_against(reference, encoder)
    shared = encoder.model.get_input_embeddings().weight  # type: ignore[attr-defined]
    assert shared.data_ptr() == encoder.model.shared.weight.data_ptr()  # type: ignore[attr-defined]


def test_scaled_fp8_weights_are_unscaled(reference: Any, spiece: bytes, tmp_path: Path):
    state = state_of(reference)
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    state[name.replace("wo.weight", "wo.scale_weight")] = torch.tensor(0.25)
    state[name] = (state[name] * 4).to(torch.float8_e4m3fn)
    state["scaled_fp8"] = torch.ones(2).to(torch.float8_e4m3fn)
    state["spiece_model"] = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    save_file({n: t.clone() for n, t in state.items()}, tmp_path / "a.safetensors")
    encoder: Any = load_text_encoder(tmp_path / "a.safetensors")
    loaded = encoder.model.state_dict()[name]
    assert torch.allclose(loaded, reference.state_dict()[name], rtol=0.07, atol=1e-2)


def test_wans_own_file_finds_a_tokenizer_beside_it(reference: Any, spiece: bytes, tmp_path: Path):
    path = tmp_path / "models_t5_umt5-xxl-enc-bf16.pth"
    torch.save(wan_names(state_of(reference)), path)
    with pytest.raises(ValueError, match=r"put tokenizer.json or spiece.model of google/umt5-xxl"):
        load_text_encoder(path)
    (tmp_path / "google/umt5-xxl").mkdir(parents=True)
    (tmp_path / "google/umt5-xxl/spiece.model").write_bytes(spiece)
    check_against(reference, load_text_encoder(path))


def test_a_hugging_face_folder_with_a_fast_tokenizer(reference: Any, tmp_path: Path):
    tokenizers = pytest.importorskip("tokenizers")
    reference.save_pretrained(tmp_path / "text_encoder")
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = ("▁put", "▁the", "▁red", "▁ball", "▁in", "▁box", "▁whisk", "▁")
    model = tokenizers.models.Unigram([*vocabulary, *((w, -1.0) for w in words)], 2, False)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer/tokenizer.json"))
    for path in (tmp_path, tmp_path / "text_encoder"):
        encoder: Any = load_text_encoder(path)
        check_against(reference, encoder)
        assert encoder.token_ids("put the ball") == [3, 4, 6, 1]


def test_umt5_cuts_at_512_and_keeps_the_end_token(
    reference: Any, spiece: bytes, tmp_path: Path, caplog
):
    (tmp_path / "spiece.model").write_bytes(spiece)
    torch.save(state_of(reference), tmp_path / "a.pth")
    encoder: Any = load_text_encoder(tmp_path / "a.pth")
    with caplog.at_level(logging.WARNING):
        ids = encoder.token_ids("ball " * 2000)
    assert (len(ids), ids[-1]) == (512, 1) and "is cut to 512" in caplog.text


def test_broken_umt5_files_are_refused_in_words(reference: Any, spiece: bytes, tmp_path: Path):
    with pytest.raises(ValueError, match="put UMT5-XXL's weights there"):
        load_text_encoder(tmp_path)
    state = state_of(reference)
    del state["encoder.block.1.layer.0.layer_norm.weight"]
    torch.save(state, tmp_path / "a.pth")
    (tmp_path / "spiece.model").write_bytes(spiece)
    with pytest.raises(ValueError, match=r"a.pth: missing: encoder.block.1.layer.0.layer_norm"):
        load_text_encoder(tmp_path / "a.pth")
    (tmp_path / "spiece.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="tokenizer is damaged"):
        load_text_encoder(tmp_path / "a.pth")
    shutil.rmtree(tmp_path)
