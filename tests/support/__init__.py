"""What many tests use. No test module is imported by another, nor is a conftest."""
