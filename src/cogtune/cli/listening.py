"""Shared by the commands that listen on a port: keys, adapters beside each other, and what has to be installed."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from cogtune.errors import ConfigError, SetupError
from cogtune.language import tr
from cogtune.system.byte_sizes import parse_size

KEY_VARIABLE = "COGTUNE_API_KEY"
"""API keys, one a line."""


def named_adapters(given: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, Path]]:
    """Return ``--adapter`` as a configuration value if it is one folder, and the named folders.

    Raises:
        ConfigError: several without different names.
    """
    if len(given) == 1 and (Path(given[0]).expanduser().is_dir() or "=" not in given[0]):
        return {"generate.adapter": [given[0]]}, {}
    named: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder or name in named:
            raise ConfigError(
                tr("--adapter {text}: several adapters have different names", text=text),
                hint=tr("write --adapter NAME=DIR for each"),
                code="config-value",
            )
        named[name] = Path(folder)
    return {}, named


def keys_of(file: Path | None) -> tuple[str, ...]:
    """Read API keys from file and environment, never from a flag, which every user of the machine can see.

    Raises:
        ConfigError: the file cannot be read, or holds none.
    """
    text = os.environ.get(KEY_VARIABLE, "")
    if file is not None:
        try:
            text += "\n" + file.expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                tr("--api-key-file {api_key_file}: {error}", api_key_file=file, error=error), code="config-value"
            ) from error
        if not text.strip():
            raise ConfigError(tr("--api-key-file {api_key_file} holds no key", api_key_file=file), code="config-value")
    return tuple(dict.fromkeys(key.strip() for key in text.splitlines() if key.strip()))


def bytes_of(name: str, size: str) -> int:
    """Return the bytes that the flag ``name`` asks for.

    Raises:
        ConfigError: not a size.
    """
    try:
        return parse_size(size)
    except ValueError as error:
        raise ConfigError(tr("{name}: {error}", name=name, error=error), code="config-value") from error


def require_key(host: str, keys: Sequence[str]) -> None:
    """Raise ConfigError if other machines reach ``host`` and there is no key."""
    if not keys and not _is_loopback(host):
        raise ConfigError(
            tr("--host {host} can be reached from other machines, and there is no API key", host=host),
            hint=tr(
                "give --api-key-file PATH or {key_variable}, or leave --host at 127.0.0.1", key_variable=KEY_VARIABLE
            ),
            code="serve-open",
        )


def require_free(host: str, port: int) -> None:
    """Raise ConfigError if nothing can listen there; loading the model, which takes long, comes after."""
    try:
        place = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        socket.create_server((str(place[4][0]), port), family=place[0]).close()
    except (OSError, OverflowError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(
            tr("--host {host} --port {port}: nothing can listen there: {reason}", host=host, port=port, reason=reason),
            hint=tr("give an address of this machine and a free port up to 65535"),
            code="config-value",
        ) from error


def require_packages(command: str, extra: str, packages: Sequence[str]) -> None:
    """Raise SetupError if a package that the command needs is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            tr("cogtune {command} needs {missing}", command=command, missing=", ".join(missing)),
            hint=f'pip install "cogtune[{extra}]"',
            code="no-server-packages",
        )


def allow_connections() -> None:
    """Let this process have as many connections open as its hard limit of files allows; often 1,024 at first."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return bool(ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return False
