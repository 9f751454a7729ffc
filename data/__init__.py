"""Rows: the record and its files, the paper's released datasets, and the embedded task."""
