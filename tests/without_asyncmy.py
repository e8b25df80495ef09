"""A plugin for pytest: Tortoise uses aiomysql, although asyncmy is installed.

``pytest -p tests.without_asyncmy -k mariadb``
"""

import sys

sys.modules["asyncmy"] = None  # type: ignore[assignment]

from tortoise.backends.mysql import client  # noqa: E402

del sys.modules["asyncmy"]
if client.mysql.__name__ != "aiomysql":
    raise RuntimeError("Tortoise has loaded asyncmy before this plugin")
