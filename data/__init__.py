"""Rows: the record and its files, teachers, the paper's datasets, and the embedded task."""
