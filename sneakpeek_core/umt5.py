"""UMT5-XXL, the text encoder of the real Wan models, through the optional `transformers`.

Reads three layouts (a Hugging Face folder, ComfyUI's single file with its tokenizer inside, Wan's
own .pth with its own names) into one module. Tokenizers come from local files only.
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .model.checkpoint import read_tensors
from .model.recognise import MAX_LAYERS
from .model.weights import fill

log = logging.getLogger(__name__)
MAX_TOKENS = 512
EOS = "</s>"
Tokenize = Callable[[str], list[int]]  # text to token ids, without the end token
_TOKENIZER_FOLDERS = (".", "tokenizer", "../tokenizer", "google/umt5-xxl", "umt5-xxl")
_SENTENCEPIECE = ("spiece.model", "tokenizer.model")
_EMBEDDED = "spiece_model"  # ComfyUI's file holds the tokenizer as bytes
# Wan's names to Hugging Face's; `N` stands for the layer.
_WAN_NAMES = (
    (r"token_embedding\.weight", "shared.weight"),
    (r"norm\.weight", "encoder.final_layer_norm.weight"),
    (r"blocks\.(\d+)\.norm1\.weight", r"encoder.block.\1.layer.0.layer_norm.weight"),
    (r"blocks\.(\d+)\.attn\.([qkvo])\.weight",
     r"encoder.block.\1.layer.0.SelfAttention.\2.weight"),
    (r"blocks\.(\d+)\.pos_embedding\.embedding\.weight",
     r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight"),
    (r"blocks\.(\d+)\.norm2\.weight", r"encoder.block.\1.layer.1.layer_norm.weight"),
    (r"blocks\.(\d+)\.ffn\.gate\.0\.weight",
     r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight"),
    (r"blocks\.(\d+)\.ffn\.fc1\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight"),
    (r"blocks\.(\d+)\.ffn\.fc2\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wo.weight"),
)  # fmt: skip


class UMT5TextEncoder:
    """A UMT5 encoder and its tokenizer. Texts run one by one, so no padding mask is needed."""

    def __init__(self, model: Any, tokenize: Tokenize, eos: int):
        self.model = model
        self._tokenize = tokenize
        self._eos = eos

    def token_ids(self, text: str) -> list[int]:
        """Return the ids of a cleaned text and the end token, at most 512; cuts with a warning."""
        ids = self._tokenize(cleaned(text))
        if len(ids) >= MAX_TOKENS:
            log.warning("text of %d tokens is cut to %d", len(ids) + 1, MAX_TOKENS)
        return [*ids[: MAX_TOKENS - 1], self._eos]

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> list[Tensor]:
        device = self.model.device
        ids = [torch.tensor([self.token_ids(text)], device=device) for text in texts]
        return [self.model(input_ids=i).last_hidden_state[0].float() for i in ids]


def cleaned(text: str) -> str:
    """Return `text` as Wan cleans prompts: HTML entities resolved, whitespace collapsed."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


def load_umt5(path: Path, device: torch.device | str, dtype: torch.dtype) -> UMT5TextEncoder:
    """Load the encoder from a file or a folder; `ValueError` names what is missing and where."""
    modules = _transformers()
    folder = path if path.is_dir() else path.parent
    tensors = _read_folder(path) if path.is_dir() else read_tensors(path)[0]
    embedded = tensors.pop(_EMBEDDED, None)
    # Found before the weights are copied: minutes of loading should not end in a missing file.
    tokenize, eos = _from_bytes(embedded) if embedded is not None else _find_tokenizer(folder)
    try:
        tensors = _unscaled(_hugging_face_names(tensors), dtype)
        with torch.device("meta"):
            model = modules.UMT5EncoderModel(_config(modules, tensors))
        tensors["shared.weight"] = tensors["shared.weight"].to(device=device, dtype=dtype)
        _tie(model, tensors)
        return UMT5TextEncoder(fill(model, tensors, dtype, device), tokenize, eos)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            'the UMT5 text encoder needs transformers; run: pip install "sneakpeek[umt5]"'
        ) from error
    return transformers


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for place in (folder, folder / "text_encoder"):
        files = sorted(place.glob("*.safetensors")) or sorted(place.glob("pytorch_model*.bin"))
        if files:
            return {name: t for file in files for name, t in read_tensors(file)[0].items()}
    raise ValueError(f"{folder} holds no *.safetensors; put UMT5-XXL's weights there")


def _hugging_face_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if "token_embedding.weight" not in tensors:
        encoder = {n: t for n, t in tensors.items() if n.startswith(("shared.", "encoder."))}
        if "shared.weight" not in encoder and "encoder.embed_tokens.weight" in encoder:
            encoder["shared.weight"] = encoder["encoder.embed_tokens.weight"]
        return encoder
    return {_renamed(name): tensor for name, tensor in tensors.items()}


def _renamed(name: str) -> str:
    for pattern, new in _WAN_NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(new)
    return name


def _unscaled(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Multiply ComfyUI's scaled fp8 weights by their scales."""
    scales = {n: t for n, t in tensors.items() if n.endswith(".scale_weight")}
    rest = {n: t for n, t in tensors.items() if n not in scales}
    for name, scale in scales.items():
        weight = name.removesuffix("scale_weight") + "weight"
        if weight in rest:
            rest[weight] = rest[weight].to(dtype) * scale.to(dtype)
    return rest


def _config(modules: Any, tensors: dict[str, Tensor]) -> Any:
    first = "encoder.block.0.layer."
    try:
        vocab, width = tensors["shared.weight"].shape
        buckets, heads = tensors[f"{first}0.SelfAttention.relative_attention_bias.weight"].shape
        inner = tensors[f"{first}0.SelfAttention.q.weight"].shape[0]
        ffn = tensors[f"{first}1.DenseReluDense.wi_0.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ValueError(
            "this is not a UMT5 encoder; use umt5_xxl_fp16.safetensors or "
            "models_t5_umt5-xxl-enc-bf16.pth"
        ) from error
    layers = len({n.split(".")[2] for n in tensors if n.startswith("encoder.block.")})
    if layers > MAX_LAYERS:
        raise ValueError(f"it has {layers} layers, at most {MAX_LAYERS} are allowed; use UMT5-XXL")
    return modules.UMT5Config(
        vocab_size=vocab, d_model=width, d_kv=inner // heads, d_ff=ffn, num_heads=heads,
        num_layers=layers,
        relative_attention_num_buckets=buckets, feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip


def _tie(model: Any, tensors: dict[str, Tensor]) -> None:
    # The embedding has two names in the module and one or two in files; cast once, it stays one.
    alias = "encoder.embed_tokens.weight"
    if alias in model.state_dict():
        tensors[alias] = tensors["shared.weight"]
    else:
        tensors.pop(alias, None)


def _find_tokenizer(folder: Path) -> tuple[Tokenize, int]:
    for place in (folder / name for name in _TOKENIZER_FOLDERS):
        if (place / "tokenizer.json").is_file():
            return _from_json(place / "tokenizer.json")
        for name in _SENTENCEPIECE:
            if (place / name).is_file():
                return _from_sentencepiece(model_file=str(place / name))
    raise ValueError(
        f"the UMT5 tokenizer is missing: put tokenizer.json or spiece.model of google/umt5-xxl "
        f"into {folder} or {folder / 'google' / 'umt5-xxl'}"
    )


def _from_json(path: Path) -> tuple[Tokenize, int]:
    from tokenizers import Tokenizer  # comes with transformers

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer ({error}); download it again") from error
    eos = tokenizer.token_to_id(EOS)
    if eos is None:
        raise ValueError(f"{path} has no {EOS} token; use that of google/umt5-xxl")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids), eos


def _from_bytes(embedded: Tensor) -> tuple[Tokenize, int]:
    return _from_sentencepiece(model_proto=embedded.to(torch.uint8).cpu().numpy().tobytes())


def _from_sentencepiece(**model: Any) -> tuple[Tokenize, int]:
    try:
        import sentencepiece
    except ImportError as error:
        raise ValueError(
            'this UMT5 tokenizer needs sentencepiece; run: pip install "sneakpeek[umt5]"'
        ) from error
    try:
        processor = sentencepiece.SentencePieceProcessor(**model)
    except (RuntimeError, OSError, TypeError) as error:
        raise ValueError(f"the UMT5 tokenizer is damaged ({error}); download it again") from error
    return lambda text: list(processor.encode(text)), processor.eos_id()
