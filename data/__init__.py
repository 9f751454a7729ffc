"""Rows: the record and its files, the paper's released datasets, and the embedded task."""

__version__ = "0.1.0"  # written into the rows that extract.py makes
