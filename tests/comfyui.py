"""ComfyUI checkouts, and scripts that run inside them.

A checkout is COMFYUI_PATH, else ~/comfy/ComfyUI, and beside it ComfyUI-0.8, the oldest that is
supported. Its Python is COMFYUI_PYTHON, else the checkout's .venv, else this one. Tests skip and
say so where there is none.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEWEST = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy/ComfyUI")
CHECKOUTS = {"newest": NEWEST, "oldest": NEWEST.with_name("ComfyUI-0.8")}
READY = "COMFYUI READY"
_BEGIN = f"""
import sys
sys.argv = ["comfyui", "--cpu"]
sys.path[:0] = {{paths!r}}
import comfy.options
comfy.options.enable_args_parsing()
import torch
import comfy.sd
print("{READY}")
"""


def run_inside(checkout: Path, script: str, *, timeout: int = 200) -> str:
    """Run a script in a checkout's Python and return what it printed; it must end well.

    `torch` and `comfy.sd` are imported; `sneakpeek_core` can be.
    """
    if not (checkout / "main.py").exists():
        pytest.skip(f"NO COMFYUI at {checkout}: set COMFYUI_PATH to a checkout to run this test")
    whole = _BEGIN.format(paths=[str(checkout), str(ROOT)]) + textwrap.dedent(script)
    done = subprocess.run(
        [_python(checkout), "-c", whole], capture_output=True, text=True, timeout=timeout
    )
    if READY not in done.stdout:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        pytest.skip(f"COMFYUI at {checkout} cannot be imported ({reason}): install what it needs")
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _python(checkout: Path) -> str:
    own = checkout / ".venv/bin/python"
    return os.environ.get("COMFYUI_PYTHON") or (str(own) if own.exists() else sys.executable)
