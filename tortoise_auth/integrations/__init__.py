"""Ties to frameworks. Nothing is imported for you: import the module of the one you use."""
