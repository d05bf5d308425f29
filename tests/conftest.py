"""Fixtures that several test files use."""

import jax
import pytest


@pytest.fixture
def x64():
    """float64 in jax, for one test."""
    with jax.enable_x64(True):
        yield
