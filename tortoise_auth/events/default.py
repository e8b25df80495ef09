"""The emitter of the application, and its methods as functions."""

from tortoise_auth.events.event_emitter import EventEmitter

emitter = EventEmitter(strict=True)
"""The emitter that models and services use unless they are given another."""

on = emitter.on
once = emitter.once
off = emitter.off
emit = emitter.emit
emit_nowait = emitter.emit_nowait
emit_sync = emitter.emit_sync
add_listener = emitter.add_listener
remove_listener = emitter.remove_listener
