"""``cogtune data``: commands about data sets, one file each."""

from __future__ import annotations

import importlib

import typer

SUBCOMMANDS = ("data_check", "data_preview", "data_convert", "data_cache")
"""Modules of this package, in the order of the help; each has ``add_to(group)``."""


def register(app: typer.Typer) -> None:
    """Add the group and its commands."""
    group = typer.Typer(rich_markup_mode=None)
    group.callback(invoke_without_command=True)(_start)
    for name in SUBCOMMANDS:
        importlib.import_module(f"cogtune.cli.{name}").add_to(group)
    app.add_typer(group, name="data")


def _start(ctx: typer.Context) -> None:
    """Look at data sets and prepare them."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
