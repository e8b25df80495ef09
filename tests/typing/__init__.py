"""Files for mypy; only `test_events.py` is run."""
