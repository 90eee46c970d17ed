"""Predict the memory, time and disk that a run needs, before any weight is loaded.

The package is callable: ``cogtune.plan(config, card="24GiB")``. See `cogtune.plan.ask.plan` for arguments and errors.

Example:
    >>> config = cogtune.load_config("run.yaml")
    >>> plan = cogtune.plan(config, card="RTX 4090")
    >>> print(plan)
"""

from cogtune.system.callable_package import make_callable

make_callable(__name__, "cogtune.plan.ask", "plan")
