"""``cogtune train``: fine-tune."""

from __future__ import annotations

from dataclasses import dataclass

from cogtune.cli.command import Command, flag
from cogtune.cli.options import Arguments

_ABOUT = """\
Fine-tune a CogVLM2 model with LoRA.

Everything can be given in a YAML file, by flags alone, or both; flags win. A list takes its flag several times, a YAML
list, or commas. Run again with the same arguments, it continues where it was interrupted."""


@dataclass(frozen=True)
class _Flags:
    dry_run: bool = flag(False, "Check configuration, data and settings, and stop before weights are loaded.")
    force: bool = flag(False, "Start although the plan says that the memory is not enough.")


def _train(flags: _Flags, line: Arguments) -> int:
    from cogtune.configuration.load import load_config
    from cogtune.distributed.environment import is_launched

    config = load_config(line.config, line.overrides)
    if config.parallel.launch is not None and not is_launched():
        from cogtune.cli.launch import launch_until_done

        return launch_until_done(line.words, config)

    from cogtune.train.run import train

    train(config, dry_run=flags.dry_run, force=flags.force)
    return 0


COMMANDS = (
    Command(
        name="train",
        summary="Fine-tune a CogVLM2 model with LoRA.",
        about=_ABOUT,
        examples=(
            "cogtune train run.yaml",
            "cogtune train --model BASE --data DIR --output OUT",
            "cogtune train run.yaml --train.lr 2e-4 --lora.targets vision-experts,glu-adapter",
            "cogtune train run.yaml --parallel.launch all",
            "torchrun --nproc-per-node 8 -m cogtune train run.yaml",
        ),
        run=_train,
        flags=_Flags,
        places=("[CONFIG.yaml]",),
        keys="run",
        most_used=(
            "model.path",
            "data.path",
            "train.output",
            "train.epochs",
            "train.batch_size",
            "train.accumulation",
            "train.lr",
            "lora.rank",
            "lora.targets",
            "quant.experts",
            "data.validation_share",
            "data.cache_features",
            "parallel.launch",
        ),
    ),
)
