"""Parts of ``scripts/compare_loaders.py``: the loaders, the files, and the table."""
