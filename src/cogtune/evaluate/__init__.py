"""Evaluation. Call it: ``cogtune.evaluate(data, adapter=...)``; see `cogtune.evaluate.run.evaluate`.

Example:
    >>> found = cogtune.evaluate("my-test-data", adapter="output", against="base")
    >>> print(found.verdict)
"""

from cogtune.system.callable_package import make_callable

make_callable(__name__, "cogtune.evaluate.run", "evaluate")
