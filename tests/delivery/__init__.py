"""Delivery under fire: processes that are killed, relays that compete."""
