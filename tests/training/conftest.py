from __future__ import annotations

import pytest

from tests.training.killer import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Forks runs that may be killed."""
    server = Server(tmp_path_factory.mktemp("home"))
    yield server
    server.close()
