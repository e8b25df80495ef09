"""The use cases, one in each module."""
