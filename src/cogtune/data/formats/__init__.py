"""Readers for other tools' formats: each module turns a file into `cogtune.data.formats.item.Item`."""
