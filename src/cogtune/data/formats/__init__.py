"""Formats of other tools, read as they are: each module turns a file into `cogtune.data.formats.item.Item`."""
