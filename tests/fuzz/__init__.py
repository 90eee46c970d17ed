"""Broken input of every kind cogtune reads, made from seeds, and what has to hold for it; `tests/fuzz/__main__.py`."""
