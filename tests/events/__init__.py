"""Tests of `tortoise_auth.events`."""
