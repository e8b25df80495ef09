"""A plugin for pytest: Tortoise uses aiomysql, although asyncmy is installed.

``pytest -p tests.without_asyncmy -k mariadb``
"""

import sys

sys.modules["asyncmy"] = None  # type: ignore[assignment]

import tortoise.backends.mysql.client  # noqa: E402

del sys.modules["asyncmy"]
if "aiomysql" not in sys.modules:
    raise RuntimeError(f"{tortoise.__name__} has loaded asyncmy before this plugin")
