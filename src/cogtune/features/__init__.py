"""The feature cache: what the frozen vision tower computes of a picture, kept on disk. See docs/concepts."""
