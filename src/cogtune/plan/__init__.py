"""Memory, time and disk of a run before anything is loaded. Call it: ``cogtune.plan(config, card="24GiB")``; see
`cogtune.plan.ask.plan` for its arguments and errors.

Example:
    >>> config = cogtune.load_config("run.yaml")
    >>> plan = cogtune.plan(config, card="RTX 4090")
    >>> print(plan)
"""

from cogtune.system.callable_package import make_callable

make_callable(__name__, "cogtune.plan.ask", "plan")
