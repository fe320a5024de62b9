"""One thread: the models are tiny, and threads would only wait for each other (also in subprocesses)."""

import gc
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# A run tries the same cases as the last one; HYPOTHESIS_PROFILE=explore looks for others.
settings.register_profile("same", derandomize=True)
settings.register_profile("explore")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

_modules = 0  # that were imported when garbage was last collected here


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What is imported stays: the collections that runs ask for, one for each, need not go through all of it."""
    global _modules
    if not _modules:
        import torch  # not before: the process that hands out tests to others needs none

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if len(sys.modules) > _modules + 10:
        gc.collect()
        gc.freeze()
        _modules = len(sys.modules)
