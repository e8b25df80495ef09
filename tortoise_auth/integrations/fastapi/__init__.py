"""FastAPI: the current user as a dependency, routes, answers to errors, the lifespan.

Needs the extra ``fastapi`` of this package: in its checkout ``pip install ".[fastapi]"``.

Example::

    guard = Guard(auth)
    CurrentUser = Annotated[User, Depends(guard.user)]

    app = FastAPI(lifespan=lifespan(auth, database=RegisterTortoise(...)))
    install(app, trusted_hops=1)
    app.include_router(auth_router(guard), prefix="/auth")
"""

try:
    import fastapi  # noqa: F401 - only whether it is there
except ImportError as missing:
    raise ImportError(
        "tortoise_auth.integrations.fastapi needs FastAPI: "
        'pip install "fastapi>=0.135", or in our checkout pip install ".[fastapi]"'
    ) from missing

from tortoise_auth.integrations.fastapi.application import install, lifespan
from tortoise_auth.integrations.fastapi.guard import Guard
from tortoise_auth.integrations.fastapi.router import QuietRoute, auth_router

__all__ = ["Guard", "QuietRoute", "auth_router", "install", "lifespan"]
