"""What is installed, and that the project's own commands are the ones it tells users."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import sneakpeek_core

ROOT = Path(__file__).parent.parent

tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_the_wheel_holds_the_core_alone():
    """A top-level `nodes` (or `tests`) would collide with ComfyUI's; embedded files come along."""
    setuptools = pytest.importorskip("setuptools")
    find = PROJECT["tool"]["setuptools"]["packages"]["find"]
    found = setuptools.find_namespace_packages(str(ROOT), include=find["include"])
    assert {name.split(".")[0] for name in found} == {"sneakpeek_core"}
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["sneakpeek_core"]
    core = ROOT / "sneakpeek_core"
    carried = {path for pattern in patterns for path in core.glob(pattern)}
    others = {p for p in core.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert others and others == carried


def test_one_version():
    """The version that files are stamped with is the one that is published."""
    assert sneakpeek_core.__version__ == PROJECT["project"]["version"]


def test_the_command_exists():
    """The console script points at something that can be called."""
    module, _, name = PROJECT["project"]["scripts"]["sneakpeek"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_ci_runs_what_the_readme_says():
    """The README has two commands; CI runs the second one as it stands there."""
    readme = (ROOT / "README.md").read_text("utf-8")
    commands = re.findall(r"^pip install .*", readme, re.MULTILINE)
    assert len(commands) == 2 and commands[0].endswith("sneakpeek demo")
    for tool in ("ruff check", "ruff format --check", "pyright", "pytest"):
        assert tool in commands[1]
    assert "grep -m1 '^pip install -e' README.md" in (ROOT / ".ci/run").read_text("utf-8")
