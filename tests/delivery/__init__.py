"""Delivery by processes that are killed, and by relays that compete."""
