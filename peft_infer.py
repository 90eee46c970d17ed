"""The published demo's inference command, on this package: ``python peft_infer.py`` talks to what was trained last.

The constants that the original asks its users to edit are flags here; everything else is `cogtune chat`.
"""

import argparse
import sys

from cogtune.cli.main import main


def arguments(given: list[str]) -> list[str]:
    """The command line of ``cogtune chat`` for this script's."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Flags of `cogtune chat` (see `cogtune chat --help`) may be added.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model_path", "--model", help="base model; default: the last training's, or the one the adapter names")
    add("--peft_model_path", "--adapter_path", "--adapter", help="adapter folder; default: the last training's")
    add("--torch_type", "--model.dtype", default="auto", help="torch.bfloat16, torch.float16, torch.float32 or auto")
    add("--image_path", "--image", help="a picture to start with")
    add("--query", help="ask this one question and end")
    known, rest = parser.parse_known_args(given)
    flags = {
        "--model": known.model_path,
        "--adapter": known.peft_model_path,
        "--model.dtype": known.torch_type.removeprefix("torch."),
        "--image": known.image_path,
        "--query": known.query,
    }
    last = [] if known.peft_model_path else ["--last"]
    return ["chat", *last, *(f"{flag}={value}" for flag, value in flags.items() if value is not None), *rest]


if __name__ == "__main__":
    sys.exit(main(arguments(sys.argv[1:])))
