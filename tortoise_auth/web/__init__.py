"""What every web framework shares, without one: addresses, cookies, origins, credentials, answers.

Pure functions of an ASGI scope, and one ASGI middleware. The integrations are built of them, and so
is yours for a framework that has none.
"""

from tortoise_auth.web.addresses import client_address
from tortoise_auth.web.answers import Answer, answer_to
from tortoise_auth.web.cookies import Cookies, CookieTokens
from tortoise_auth.web.credentials import Credentials, credentials
from tortoise_auth.web.cross_origin import CrossOriginCheck
from tortoise_auth.web.middleware import RequestContextMiddleware

__all__ = [
    "Answer",
    "CookieTokens",
    "Cookies",
    "Credentials",
    "CrossOriginCheck",
    "RequestContextMiddleware",
    "answer_to",
    "client_address",
    "credentials",
]
