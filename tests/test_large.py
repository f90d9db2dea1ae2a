"""A model of the real size runs through the same command line, on a CPU of 24 GB."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sneakpeek_core.frozen import FrozenCache
from sneakpeek_core.model.config import ModelConfig
from sneakpeek_core.model.initial import random_vae
from sneakpeek_core.model.transformer import WanTransformer
from sneakpeek_core.mp4 import probe
from sneakpeek_core.text_encoder import random_text_encoder, save_text_encoder

ROOT = Path(__file__).parent.parent
CONFIG = ModelConfig(dim=1536, ffn_dim=8960, layers=30)  # Wan 2.1 T2V 1.3B
DISK_BYTES = 6 * 10**9
PEAK_BYTES = 12 * 10**9
WIDTH, HEIGHT = 192, 112

# Runs `main` and reports what it took: the peak of this process alone, and the parts' seconds.
MEASURED = """
    import json, resource, sys, time
    from sneakpeek_core.cli import jobs, main
    from sneakpeek_core.sampler import Rollout
    from sneakpeek_core.vae.streaming import StreamingDecoder
    seconds = {}
    def timed(owner, name):
        run = getattr(owner, name)
        def measured(*arguments, **options):
            began = time.monotonic()
            made = run(*arguments, **options)
            seconds[name] = seconds.get(name, 0) + time.monotonic() - began
            return made
        setattr(owner, name, measured)
    for owner, name in ((jobs, "load_parts"), (jobs, "encode_picture"), (Rollout, "make"),
                        (Rollout, "commit"), (StreamingDecoder, "decode")):
        timed(owner, name)
    code = main(sys.argv[1:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "seconds": seconds}))
    sys.exit(code)
"""


def save_large_transformer(path: Path) -> None:
    """Write random bf16 weights under a trainer's names, made in bf16: never held twice."""
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in WanTransformer(CONFIG).state_dict().items()}
    rng = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=rng)
        tensor *= 0.1 if fan_in == 1 else fan_in**-0.5
        tensors[f"model.{name}"] = tensor + 1 if "norm" in name and "weight" in name else tensor
    save_file(tensors, path)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Path]:
    if shutil.disk_usage(tmp_path).free < DISK_BYTES:
        pytest.skip(f"less than {DISK_BYTES / 1e9:.0f} GB of disk are free")
    save_large_transformer(tmp_path / "model.safetensors")
    vae = {name: t.bfloat16() for name, t in random_vae(96, 0).state_dict().items()}
    save_file(vae, tmp_path / "vae.safetensors")
    save_text_encoder(tmp_path / "text.safetensors", random_text_encoder(0))
    (tmp_path / "steps.txt").write_text("[0.75s] whisk the eggs\n")
    yield tmp_path
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux reports it")
def test_a_model_of_1_3b_streams_a_chunk_on_a_cpu(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A start image and a chunk of three latent frames in bf16, within half of 24 GB."""
    options = [
        "--model", "model.safetensors", "--vae", "vae.safetensors",
        "--text-encoder", "text.safetensors", "--steps", "steps.txt",
        "--image", str(ROOT / "sneakpeek_core/embedded/start.png"),
        "--size", f"{WIDTH}x{HEIGHT}", "--sampling-steps", "2",
        "--out", "a.mp4", "--save-cache", "a.cache",
    ]  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURED), "generate", *options],
        cwd=files, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    took = json.loads(ran.stdout.splitlines()[-1])
    with capsys.disabled():
        seconds = ", ".join(f"{name} {value:.1f} s" for name, value in took["seconds"].items())
        print(f"\n1.3B at {WIDTH}x{HEIGHT}: {seconds}, peak {took['peak'] / 1e9:.1f} GB")
    facts = probe(files / "a.mp4")
    assert (facts.frames, facts.width, facts.height) == (13, WIDTH, HEIGHT)
    cache = FrozenCache.load(files / "a.cache")
    assert cache.frontier == 4 and cache.keys[0].dtype == torch.bfloat16
    assert cache.warm.shape[2] == 4 and bool(torch.isfinite(cache.warm).all())
    assert cache.warm[:, :, 1:].std() > 0.01
    assert took["peak"] < PEAK_BYTES
