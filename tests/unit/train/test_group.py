"""Joining the other processes of a run, when that cannot work."""

from __future__ import annotations

import socket

import pytest

from cogtune.errors import SetupError
from cogtune.train.engines.group import Group


def test_a_port_that_another_run_uses_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deepspeed launcher always takes port 29500, so a second run on a machine meets the first."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SetupError, match=f"port {port}") as caught:
            Group.join()
    assert caught.value.exit_code == 2
    assert "--master_port" in (caught.value.hint or "")
