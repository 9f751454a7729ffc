"""The paper's comparisons as tables and pictures: `python -m dss.study`."""
