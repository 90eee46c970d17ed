"""Fine-tuning. Call it: ``cogtune.train(config)``; see `cogtune.train.run.train` for its arguments and errors.

Example:
    >>> config = cogtune.load_config("run.yaml", {"train.lr": 3e-4})
    >>> result = cogtune.train(config)
    >>> result.adapter, result.loss, result.validation_loss
"""

from cogtune.system.callable_package import make_callable

make_callable(__name__, "cogtune.train.run", "train")
