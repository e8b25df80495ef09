"""``python -m tortoise_auth.cli`` is the same command."""

from tortoise_auth.cli import main

main()
