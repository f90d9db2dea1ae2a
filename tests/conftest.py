"""Shared by all tests: one thread (two spin against each other on a busy machine), small models."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
