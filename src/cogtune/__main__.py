"""``python -m cogtune`` is ``cogtune``; launchers such as torchrun start it with ``-m cogtune``."""

from cogtune.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
