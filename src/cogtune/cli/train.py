"""``cogtune train``: fine-tune."""

from __future__ import annotations

import typer

_USAGE = "usage: cogtune train [CONFIG.yaml] [--section.key value ...]"
_ABOUT = """\
Fine-tune a CogVLM2 model with LoRA.

Everything can be given in a YAML file, by flags alone, or both; flags win. A list takes its flag several times, a YAML
list, or commas. Run again with the same arguments, it continues where it was interrupted.

  cogtune train --model BASE --data DIR --output OUT
  cogtune train run.yaml --train.lr 2e-4 --lora.targets vision-experts,glu-adapter
  cogtune train run.yaml --parallel.launch all
  torchrun --nproc-per-node 8 -m cogtune train run.yaml"""
_FLAGS = {
    "--config FILE": "The configuration file, as the first argument.",
    "--dry-run": "Check configuration, data and settings, and stop before weights are loaded.",
    "--force": "Start although the plan says that the memory is not enough.",
    "--help, -h": "This text.",
}


def register(app: typer.Typer) -> None:
    """Add the command. Its flags are configuration keys, so they are split by `cogtune.cli.options`."""
    app.command(
        "train",
        help="Fine-tune a CogVLM2 model with LoRA.",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )(_train)


def _train(ctx: typer.Context) -> int:
    from cogtune.cli.options import split_arguments

    if {"--help", "-h"} & set(ctx.args):
        _print_help()
        return 0
    arguments = split_arguments(ctx.args, switches=["dry-run", "force"])

    from cogtune.configuration.load import load_config
    from cogtune.distributed.environment import is_launched

    config = load_config(arguments.config, arguments.overrides)
    if config.parallel.launch is not None and not is_launched():
        from cogtune.cli.launch import launch_until_done

        return launch_until_done(ctx.args, config)

    from cogtune.train.run import train

    train(config, dry_run="dry-run" in arguments.switches, force="force" in arguments.switches)
    return 0


def _print_help() -> None:
    from cogtune.cli.options import flags_help, keys_help

    print("\n".join([_USAGE, "", _ABOUT, "", "Flags of this invocation:", *flags_help(_FLAGS)]))
    print("\nConfiguration keys:", end="")
    print("\n".join(["", *keys_help()]))
