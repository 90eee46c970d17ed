"""Amounts of memory as people write them."""

from __future__ import annotations

import pytest

from cogtune.system.byte_sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("30GiB", 30 * 2**30), ("30 gb", 30 * 10**9), ("1.5TiB", 3 * 2**39), (" 512 MiB ", 2**29), ("7B", 7)],
)
def test_parse(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "30", "GiB", "-1GiB", "1,5GiB", "30 gigs", "0GiB"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


def test_format() -> None:
    assert [format_size(n) for n in (0, 1023, 2**20, 10.27 * 2**30, 128 * 2**30, 2**41)] == [
        "0 B",
        "1023 B",
        "1.0 MiB",
        "10.3 GiB",
        "128 GiB",
        "2.0 TiB",
    ]
