"""The feature cache: the frozen vision tower's output for each picture, stored on disk. See docs/concepts."""
