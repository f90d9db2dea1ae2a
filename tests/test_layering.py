"""The layout as a test: every file imports what its row allows, and the README lists every file.

A row names what a file may import beyond the standard library: other packages, and files of
`sneakpeek_core` without their suffix. Data flows one way (design, section 2): what makes latents
stands above what turns them into frames, and never looks down.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "sneakpeek_core"

LAYOUT = {
    "__init__": "",
    # what is planned: no torch
    "shapes": "",
    "whole_file": "",
    "schedule": "shapes",
    "edits": "schedule",
    "guidance": "schedule",
    "policy": "schedule",
    "settings": "guidance policy schedule",
    # what samples
    "sigmas": "",
    "noise": "torch",
    "conditioning": "torch schedule shapes",
    "cache": "torch policy model.rope",
    "denoiser": "torch sigmas model.forward model.rope",
    "sampler": "torch cache conditioning denoiser guidance model.rope noise policy settings shapes"
    " sigmas",
    # values, and what keeps them
    "records": "torch safetensors conditioning guidance policy schedule settings",
    "frozen": "torch safetensors cache conditioning model.config records sampler schedule settings"
    " shapes whole_file",
    "latent_store": "torch numpy",
    "journal": "records",
    "start": "torch shapes",
    "stream": "torch cache conditioning denoiser edits frozen latent_store model.config sampler"
    " schedule settings shapes start",
    "recording": "torch conditioning frozen journal records schedule shapes stream",
    # what shows: knows latents and frames, never sigmas
    "mp4": "av whole_file",
    "video": "torch numpy av mp4 whole_file",
    "contact_sheet": "torch numpy PIL video whole_file",
    "frames": "torch contact_sheet shapes stream video",
    # files to parts
    "processor": "torch",
    "pictures": "torch numpy PIL kornia",
    "text_encoder": "torch umt5 model.checkpoint model.initial model.recognise model.weights",
    "umt5": "torch transformers tokenizers sentencepiece model.checkpoint model.recognise"
    " model.weights",
    "assembly": "torch conditioning denoiser model.config model.inspect model.lora model.presets"
    " model.weights pictures processor schedule stream text_encoder vae.streaming vae.wan",
    "estimate": "torch psutil cache model.config settings shapes vae.streaming",
    "model.__init__": "",
    "model.config": "shapes",
    "model.rope": "torch",
    "model.transformer": "torch shapes model.config",
    "model.forward": "torch einops shapes model.config model.rope",
    "model.parallel": "torch model.rope",
    "model.initial": "torch model.config model.transformer vae.wan",
    "model.lora": "torch model.tensor_files",
    "model.presets": "guidance sigmas model.config",
    "model.tensor_files": "torch safetensors",
    "model.checkpoint": "torch model.tensor_files",
    "model.recognise": "shapes model.config",
    "model.fingerprint": "torch model.checkpoint",
    "model.weights": "torch safetensors vae.wan model.checkpoint model.config model.fingerprint"
    " model.initial model.presets model.recognise model.transformer whole_file",
    "model.inspect": "shapes vae.wan model.checkpoint model.config model.presets model.recognise"
    " model.tensor_files model.weights",
    "vae.__init__": "",
    "vae.wan": "torch einops processor shapes",
    "vae.streaming": "torch einops shapes vae.wan",
    # the toy world: scenes and their pictures; then the pixels of anyone's video, and its score
    "toyworld.__init__": "",
    "toyworld.scene": "",
    "toyworld.motion": "toyworld.scene",
    "toyworld.render": "torch toyworld.motion toyworld.scene",
    "toyworld.detect": "torch toyworld.render toyworld.scene",
    "toyworld.score": "torch toyworld.detect toyworld.motion toyworld.render toyworld.scene",
    "toyworld.rollouts": "torch assembly conditioning denoiser model.rope schedule settings stream"
    " toyworld.motion toyworld.render toyworld.scene vae.streaming",
    "toyworld.results": "toyworld.score",
    "toyworld.evaluation": "assembly guidance settings shapes sigmas toyworld.results"
    " toyworld.rollouts toyworld.scene toyworld.score",
    "toyworld.controls": "torch assembly guidance settings toyworld.evaluation toyworld.render"
    " toyworld.rollouts toyworld.scene toyworld.score vae.streaming",
    "toyworld.plots": "matplotlib toyworld.evaluation toyworld.results toyworld.score",
    # training
    "training.__init__": "",
    "training.recipe": "tomli whole_file",
    "training.muon": "torch",
    "training.curves": "matplotlib",
    "training.loop": "torch accelerate tqdm training.curves training.muon training.recipe",
    "training.latent_set": "torch safetensors shapes vae.streaming vae.wan whole_file",
    "training.video_folder": "torch numpy av pictures schedule shapes training.latent_set",
    "training.sources": "torch shapes toyworld.render toyworld.scene training.latent_set"
    " training.recipe training.video_folder",
    "training.attention": "torch model.forward",
    "training.clips": "torch",
    "training.vae_stage": "torch model.weights shapes training.clips training.recipe"
    " training.sources vae.streaming vae.wan",
    "training.layout": "guidance model.parallel policy schedule training.recipe",
    "training.lora": "torch peft model.lora model.weights",
    "training.cuts": "torch",
    "training.sequences": "torch model.parallel training.cuts training.layout training.recipe",
    "training.own_past": "torch training.recipe training.sequences",
    "training.causal_stage": "torch guidance model.config model.forward model.parallel"
    " model.presets model.rope model.transformer model.weights shapes sigmas training.attention"
    " training.layout training.lora training.own_past training.recipe training.sequences",
    "training.stages": "torch accelerate tqdm assembly model.fingerprint model.weights text_encoder"
    " training.causal_stage training.latent_set training.loop training.recipe training.sources"
    " training.vae_stage vae.wan",
    # the command line
    "cli.__init__": "cli.endings cli.options",
    "cli.__main__": "cli.__init__",
    "cli.endings": "torch stream",
    "cli.options": "torch guidance policy settings shapes cli.demo cli.estimate cli.evaluate"
    " cli.generate cli.inspect cli.sampling cli.toyworld cli.train",
    "cli.sampling": "guidance model.presets policy settings sigmas",
    "cli.steps": "torch assembly pictures schedule cli.options",
    "cli.order": "torch assembly estimate frozen schedule settings cli.options cli.sampling"
    " cli.steps",
    "cli.jobs": "__init__ assembly estimate frozen journal mp4 recording records schedule stream"
    " vae.wan video cli.options cli.order",
    "cli.generate": "contact_sheet frames shapes stream vae.streaming cli.endings cli.jobs"
    " cli.progress cli.watch",
    "cli.progress": "frames shapes stream",
    "cli.watch": "edits schedule shapes stream cli.endings cli.steps",
    "cli.inspect": "journal model.inspect model.tensor_files mp4 records schedule shapes"
    " cli.endings cli.jobs",
    "cli.estimate": "__init__ shapes cli.order",
    "cli.demo": "torch assembly conditioning contact_sheet frames schedule stream toyworld.render"
    " toyworld.scene toyworld.score vae.streaming video cli.progress cli.sampling",
    "cli.evaluate": "__init__ assembly guidance model.fingerprint records settings"
    " toyworld.controls toyworld.evaluation toyworld.plots toyworld.results toyworld.scene"
    " cli.options cli.sampling whole_file",
    "cli.toyworld": "PIL contact_sheet toyworld.render toyworld.scene training.video_folder video",
    "cli.train": "training.stages",
}
# Imported for annotations only, in files that run without it.
FOR_TYPES = {"policy": "torch", "sigmas": "torch"}
FILES = {
    ".".join(path.relative_to(CORE).with_suffix("").parts): path for path in CORE.rglob("*.py")
}


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """Return what a file imports when it runs, and what under TYPE_CHECKING."""
    tree = ast.parse(path.read_text("utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    running, typing = set(), set()
    for node in ast.walk(tree):
        names = _names(node, path)
        (typing if id(node) in typing_only else running).update(names)
    return running, typing


def _names(node: ast.AST, path: Path) -> set[str]:
    if isinstance(node, ast.Import):
        found = {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and not node.level:
        found = {(node.module or "").split(".")[0]}
    elif isinstance(node, ast.ImportFrom):
        base = path.relative_to(CORE).parts[:-1]
        base = base[: len(base) - node.level + 1]
        assert len(path.relative_to(CORE).parts) >= node.level, "an import from outside the core"
        return {".".join([*base, *((node.module or "__init__").split("."))])}
    else:
        return set()
    return {name for name in found if name not in sys.stdlib_module_names}


def test_every_file_has_a_row():
    """A new file says what it may import; a row without a file goes."""
    assert sorted(FILES) == sorted(LAYOUT)


@pytest.mark.parametrize("name", LAYOUT)
def test_file_imports_what_its_row_allows(name: str):
    """Neither more (that breaks the layers) nor less (the row would be out of date)."""
    running, typing = imports_of(FILES[name])
    assert running == set(LAYOUT[name].split())
    assert typing - running <= set(FOR_TYPES.get(name, "").split())


def test_core_never_imports_its_hosts():
    """`sneakpeek_core` runs without ComfyUI and without the nodes."""
    hosts = ("comfy", "nodes", "folder_paths", "server", "execution")
    for name, path in FILES.items():
        running, typing = imports_of(path)
        for imported in running | typing:
            assert not imported.startswith(hosts), f"{name} imports {imported}"


def test_sampling_never_sees_frames_and_decoding_never_sees_sigmas():
    """Follow the rows: nothing above reaches what lies below it in the flow, however far round."""
    for name in ("sampler", "stream", "recording"):
        assert not {"av", "PIL", "video", "frames", "vae.wan", "contact_sheet"} & _reached(name)
    for name in ("vae.streaming", "video", "contact_sheet"):
        assert not {"sigmas", "sampler", "denoiser", "schedule"} & _reached(name)


def _reached(name: str) -> set[str]:
    seen, left = set(), {name}
    while left:
        current = left.pop()
        seen.add(current)
        left |= set(LAYOUT.get(current, "").split()) - seen
    return seen


def test_readme_lists_every_file():
    """The tree in the README has one line per file, and no file that is gone."""
    lines = (ROOT / "README.md").read_text("utf-8").split("## Tree")[1].split("```")[1].splitlines()
    folder, listed = "", set()
    for line in filter(str.strip, lines):
        name = line.split()[0]
        if name.endswith("/") and not line.startswith(" "):
            folder = name
        elif line.startswith(" "):
            listed.add(folder + name)
        else:
            listed.add(name)
    kept = (ROOT / folder for folder in ("sneakpeek_core", "tests"))
    there = {
        str(path.relative_to(ROOT))
        for base in kept
        for path in base.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and "data" not in path.parts
    }
    inside = {name for name in listed if name.startswith(("sneakpeek_core/", "tests/"))}
    assert inside == there | {"tests/data/self_forcing"}
