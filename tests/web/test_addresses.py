"""The address of the client, behind proxies and in front of liars."""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.requests import PEER, SCOPES, Scope, forwarded, request
from tortoise_auth.web import addresses, client_address

REAL = "203.0.113.7"


@pytest.fixture(autouse=True)
def fresh_warning() -> Iterator[None]:
    """Let each test be the first of its process to warn."""
    addresses._warn_of_too_few.cache_clear()
    yield
    addresses._warn_of_too_few.cache_clear()


class TestForwardedFor:
    @pytest.mark.parametrize(
        ("lines", "one", "two"),
        [
            ([], PEER, PEER),
            ([""], PEER, PEER),
            ([REAL], REAL, PEER),
            ([f"1.2.3.4, {REAL}"], REAL, "1.2.3.4"),
            (["1.2.3.4", REAL], REAL, "1.2.3.4"),
            ([f"1.2.3.4, {REAL}, 10.0.0.2"], "10.0.0.2", REAL),
            ([f"{REAL}, unknown"], PEER, REAL),
            (["<script>alert(1)</script>"], PEER, PEER),
            (["1" * 5000], PEER, PEER),
            ([f"{REAL}\0"], PEER, PEER),
            (["0177.0.0.1"], PEER, PEER),
            ([f"{REAL}:5511"], REAL, PEER),
            (["[2001:db8::1]:99"], "2001:db8::1", PEER),
            (["[2001:db8::1]"], "2001:db8::1", PEER),
            (["2001:DB8:0::1"], "2001:db8::1", PEER),
            ([f"::ffff:{REAL}"], REAL, PEER),
            (["64:ff9b::cb00:7107"], REAL, PEER),
            (["fe80::1%eth0"], PEER, PEER),
            ([f'"{REAL}"'], REAL, PEER),
            ([f'"{REAL}'], PEER, PEER),
            ([f"{REAL},"], PEER, REAL),
            ([f"{REAL}:port"], PEER, PEER),
            (["localhost"], PEER, PEER),
            ([f"1.2.3.4\t,\t {REAL} "], REAL, "1.2.3.4"),
        ],
    )
    def test_hops(self, lines: list[str], one: str, two: str) -> None:
        """The n-th element from the right counts if it is an address, and else the peer."""
        assert client_address(forwarded(*lines)) == PEER
        assert client_address(forwarded(*lines), trusted_hops=1) == one
        assert client_address(forwarded(*lines), trusted_hops=2) == two

    @pytest.mark.parametrize(
        "header", ["forwarded", "x-real-ip", "cf-connecting-ip", "x-client-ip"]
    )
    def test_no_other_header(self, header: str) -> None:
        """A header that was not named is not read."""
        scope = forwarded("for=1.2.3.4" if header == "forwarded" else "1.2.3.4", header=header)
        assert client_address(scope, trusted_hops=1) == PEER
        assert client_address(scope, trusted_hops=1, header=header) == "1.2.3.4"


class TestPeer:
    @pytest.mark.parametrize(
        ("client", "address"),
        [
            ((REAL, 1), REAL),
            ([REAL, 1], REAL),
            ((f"::ffff:{REAL}", 1), REAL),
            (("fe80::1%eth0", 1), "fe80::1"),
            (("unknown", 0), None),
            (("testclient", 50000), None),
            (("", 0), None),
            ((None, None), None),
            (None, None),
        ],
    )
    def test_is_an_address_or_none(self, client: object, address: str | None) -> None:
        """What the server reports counts if it is an address: servers report other words, too."""
        assert client_address(request(client=client)) == address
        assert client_address(forwarded("no address", client=client), trusted_hops=1) == address

    def test_behind_a_socket(self) -> None:
        """Over a socket there is no peer, and the proxy's element counts all the same."""
        scope = forwarded(f"1.2.3.4, {REAL}", client=None)
        assert client_address(scope) is None
        assert client_address(scope, trusted_hops=1) == REAL

    def test_scope_without_client(self) -> None:
        """A server may leave out the client, as ASGI allows."""
        assert client_address({"type": "http", "headers": []}) is None


class TestForwarded:
    @pytest.mark.parametrize(
        ("lines", "one", "two"),
        [
            ([f"for={REAL}"], REAL, PEER),
            ([f"For={REAL};proto=https;by=10.0.0.1"], REAL, PEER),
            ([f"proto=https; for={REAL}"], REAL, PEER),
            ([f"for=1.2.3.4, for={REAL}"], REAL, "1.2.3.4"),
            (["for=1.2.3.4", f"for={REAL}"], REAL, "1.2.3.4"),
            (['for="[2001:db8::1]:4711"'], "2001:db8::1", PEER),
            ([f'for="{REAL}:4711"'], REAL, PEER),
            (["for=_hidden"], PEER, PEER),
            (["for=unknown"], PEER, PEER),
            (["proto=https"], PEER, PEER),
            ([f"for={REAL};for=1.2.3.4"], PEER, PEER),
            ([f"for={REAL};;"], PEER, PEER),
            ([REAL], PEER, PEER),
            ([f'for={REAL};host="a,b;for=1.2.3.4"'], REAL, PEER),
            ([f'for={REAL};host="a\\",for=1.2.3.4"'], REAL, PEER),
            ([f'for="1.2.3.4, for={REAL}'], REAL, PEER),
            (['for="1.2.3.4', f"for={REAL}"], REAL, PEER),
            ([f'host="\\", for={REAL}'], REAL, PEER),
            ([""], PEER, PEER),
        ],
    )
    def test_hops(self, lines: list[str], one: str, two: str) -> None:
        """Elements count from the right, whatever quotation mark a client leaves open."""
        scope = forwarded(*lines, header="forwarded")
        assert client_address(scope, trusted_hops=1, header="forwarded") == one
        assert client_address(scope, trusted_hops=2, header="forwarded") == two


def test_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    """That the number of hops does not fit is logged once, and without an address."""
    with caplog.at_level(logging.WARNING, "tortoise_auth"):
        for _ in range(3):
            client_address(forwarded(REAL), trusted_hops=2)
        client_address(forwarded(REAL), trusted_hops=1)
    (record,) = caplog.records
    assert record.getMessage().startswith("A request had fewer than 2 elements in x-forwarded-for")
    assert REAL not in record.getMessage()


@given(SCOPES, st.integers(0, 3), st.sampled_from(["x-forwarded-for", "forwarded", "host"]))
def test_never_anything_else(scope: Scope, hops: int, header: str) -> None:
    """Whatever comes, the result is one spelling of an address, or none."""
    address = client_address(scope, trusted_hops=hops, header=header)
    assert address is None or str(ipaddress.ip_address(address)) == address


@given(st.text(st.characters(max_codepoint=255), max_size=60), st.sampled_from([", ", ","]))
def test_client_cannot_move_the_element(forged: str, comma: str) -> None:
    """Nothing that a client writes changes what its proxy appends."""
    scope = forwarded(f"{forged}{comma}{REAL}")
    assert client_address(scope, trusted_hops=1) == REAL
    scope = forwarded(f"{forged}{comma}for={REAL}", header="forwarded")
    assert client_address(scope, trusted_hops=1, header="forwarded") == REAL


@pytest.mark.parametrize("filling", ['"', "\\", ",", ":", ";", "=", "a", "for=", '\\"', 'for="'])
@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded"])
def test_long_headers(filling: str, header: str) -> None:
    """A header of half a megabyte costs linear time; a square of it would be minutes."""
    started = time.process_time()
    client_address(forwarded(filling * 500_000, header=header), trusted_hops=50, header=header)
    assert time.process_time() - started < 5
