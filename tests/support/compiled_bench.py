"""``cogtune ARGUMENTS`` with layers that the compiler traces and differentiates whole, with no code generated.

    python -m tests.support.compiled_bench bench train ...

Generated code takes g++ most of a minute; a layer's is tested on one device (``test_train_loop``).
"""

from __future__ import annotations

import sys
from functools import partial

from cogtune.cli.main import main
from cogtune.model.compile import compile_layers
from cogtune.train import model_setup

if __name__ == "__main__":
    model_setup.compile_layers = partial(compile_layers, backend="aot_eager")
    sys.exit(main(sys.argv[1:]))
