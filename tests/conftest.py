"""What all tests share: a cache of compiled programs, as long as they last."""

import gc

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
    """Tests that compile the same program, as two runs of one configuration do, compile it once."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """A file's programs go with it: Linux lets a process map 65,530 pieces of memory, and aborts
    XLA's compiler beyond; each program takes some.
    """
    yield
    jax.clear_caches()
    gc.collect()
