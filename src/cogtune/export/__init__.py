"""Handing an adapter on: a folder to give away, with a model card written from the run, and its upload."""
