"""Provide a folder for artifacts, so that a test neither uses nor fills the user's, and each network is exported once."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEINST_CACHE", str(folder))
        yield folder
