"""Whether ``import passlib`` gives libpass, its continuation, and not passlib itself.

Both distributions have the same import name, so ``pip install passlib``, also by a requirement of
another package, replaces files of libpass without a word. passlib 1.7.4 cannot verify bcrypt hashes
with bcrypt 5: every password of such an account would be wrong.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from tortoise_auth.exceptions import ConfigurationError

_VERSION = re.compile(r"""^__version__ = ["'](\d+)\.(\d+)""", re.MULTILINE)
_FIRST_OF_LIBPASS = (1, 8)


def require_libpass() -> None:
    """Look at the installed files; nothing is imported, and it takes 0.1 ms.

    Raises:
        ConfigurationError: They are not those of libpass; the message says which command mends it.
    """
    spec = importlib.util.find_spec("passlib")
    if spec is not None and spec.origin is not None:
        try:
            version = _VERSION.search(Path(spec.origin).read_text(encoding="utf-8"))
        except OSError:  # in a bundle of another form, which names its parts
            return
        if version is None or (int(version[1]), int(version[2])) >= _FIRST_OF_LIBPASS:
            return
    raise ConfigurationError(
        "passlib is installed over libpass, or was removed and took files of libpass along: both use "
        "the import name passlib, and passlib 1.7.4 rejects every right password with bcrypt 5. "
        "Mend it with: pip uninstall -y passlib && pip install --force-reinstall --no-deps libpass"
    )
