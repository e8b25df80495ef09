"""The accounts: the model that a host subclasses, and every change of a row of it."""

from tortoise_auth.users.model import AbstractUser, UserT

__all__ = ["AbstractUser", "UserT"]
