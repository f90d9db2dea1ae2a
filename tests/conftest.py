"""Shared by all tests: one thread, since two spin against each other on a busy machine.

`shelf` and `bench` are for the tests of the command line.
"""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

# What these assert fails with values, as it does in the tests themselves.
pytest.register_assert_rewrite(
    "tests.bad_input",
    "tests.command_line",
    "tests.driven_cache",
    "tests.interrupts",
    "tests.moving_picture",
)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_accelerator():
    """`accelerate` keeps the first precision it is asked for, for the rest of the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory):
    """A model, its VAE and its text encoder, as files."""
    from tests.command_line import make_shelf

    return make_shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shelf):
    """A working folder with steps to make, beside the shelf."""
    from tests.command_line import make_bench

    monkeypatch.chdir(tmp_path)
    return make_bench(tmp_path, shelf)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter):
    """Print what tests have measured and recorded: times are reported, never asserted."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid.split('::')[-1]}: {name} {value}")
