"""Owns the environment of the tests: JAX on CPU, no network, caches in a temporary folder."""

import gc
import os
import shutil
import tempfile

# All of this must be set before the first test module imports jax or transformers.
_CACHE = tempfile.mkdtemp(prefix="saro_jax_tests_")

# A GPU or TPU run of the tests says so: JAX_PLATFORMS=cuda make test.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = os.path.join(_CACHE, "datasets")
os.environ["SARO_JAX_CACHE"] = os.path.join(_CACHE, "saro_jax")


def pytest_runtest_teardown() -> None:
    """Take what a test leaves out of the garbage collector's sight.

    JAX keeps what it has traced, millions of objects in the end, and each full collection walks
    through all of them: a third of the suite's time.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)
