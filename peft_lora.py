"""The published demo's fine-tuning command, on this package: ``deepspeed peft_lora.py --ds_config ds_config.yaml``."""

import sys

from cogtune.cli.main import guarded
from cogtune.cli.published import train_published
from cogtune.system.allocator import prepare_allocator

if __name__ == "__main__":
    prepare_allocator()  # torch is imported behind it
    sys.exit(guarded(lambda: train_published(sys.argv[1:])))
