"""What is said of a place where nothing can listen."""

from __future__ import annotations

import socket

import pytest

from cogtune.cli.listening import require_free
from cogtune.errors import ConfigError


def test_a_place_where_nothing_can_listen_is_said_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for host, port in (("127.0.0.1", taken.getsockname()[1]), ("127.0.0.1", 99999), ("192.0.2.1", 0)):
            with pytest.raises(ConfigError, match=f"--host {host} --port {port}: nothing can listen there: .+"):
                require_free(host, port)
    require_free("127.0.0.1", 0)
    require_free("localhost", 0)
