"""Files that mypy checks and nobody runs."""
