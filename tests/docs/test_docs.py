"""The pages: their snippets run, their links lead somewhere, their tables are complete."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tortoise import fields
from tortoise.context import TortoiseContext

import tortoise_auth
from tests.support.accounts import PASSWORD, SECRET
from tests.support.app import AuditRow, User
from tests.support.snippets import ROOT, run, snippets
from tortoise_auth import AbstractUser, AuthConfig, AuthService, EventEmitter, on
from tortoise_auth.events import emitter as library_emitter
from tortoise_auth.events.catalog import declared_events
from tortoise_auth.testing import isolated

PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
async def namespace(
    sqlite: TortoiseContext, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[dict[str, Any]]:
    """The names that the snippets use: a user, a service, and the default emitter."""
    monkeypatch.setattr(AbstractUser, "emitter", library_emitter)
    monkeypatch.setenv("AUTH_SECRET", SECRET)
    mails: list[tuple[str, ...]] = []

    async def send_mail(*mail: str) -> None:
        mails.append(mail)

    class BlockingClient:
        def notify(self, text: str) -> None:
            mails.append((text,))

    with isolated(library_emitter):
        yield {
            "AbstractUser": AbstractUser,
            "AuditRow": AuditRow,
            "AuthConfig": AuthConfig,
            "AuthService": AuthService,
            "User": User,
            "auth": AuthService(User, AuthConfig(secret=SECRET)),
            "blocking_client": BlockingClient(),
            "emitter": library_emitter,
            "fields": fields,
            "mails": mails,
            "on": on,
            "os": os,
            "password": PASSWORD,
            "send_mail": send_mail,
            "user": await User.create_user(email="ada@example.com", password=PASSWORD),
        }
        await library_emitter.aclose()


class TestReadme:
    async def test_example_runs(self, namespace: dict[str, Any]) -> None:
        """The example of the README runs as it stands, after the model, which the tests have."""
        await namespace["user"].delete()  # the example creates the account
        (source,) = snippets(ROOT / "README.md")
        model, rest = source.split("\n\n", 1)
        assert model.startswith("class User(AbstractUser):")
        await run(rest, namespace, "README.md")
        assert await AuditRow.filter(event="login").count() == 1

    def test_is_short(self) -> None:
        """The README has fewer than 120 lines."""
        assert len((ROOT / "README.md").read_text().splitlines()) < 120


class TestEventsPage:
    async def test_snippets_run(
        self, namespace: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Every snippet runs, in order, and no handler on the page fails."""
        sources = list(snippets(ROOT / "docs" / "events.md"))
        assert len(sources) > 10
        for source in sources:
            await run(source, namespace, "docs/events.md")
        await namespace["auth"].set_password(namespace["user"], "a wholly different phrase")
        await library_emitter.aclose()
        assert [mail[0] for mail in namespace["mails"]][-1] == "ada@example.com"
        assert not caplog.records

    def test_table_is_complete(self) -> None:
        """The table names every event of the library."""
        page = (ROOT / "docs" / "events.md").read_text()
        ours = [each for each in declared_events() if each.__module__.startswith("tortoise_auth.")]
        assert len(ours) > 10
        for event in ours:
            assert f"| `{event.name}` | `{event.__name__}` |" in page


class TestLinks:
    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_lead_somewhere(self, page: Path) -> None:
        """Every relative link names a file that exists."""
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), target


class TestVersion:
    def test_changelog_knows_it(self) -> None:
        """The version is the newest in the changelog, or there is an unreleased section."""
        changelog = (ROOT / "CHANGELOG.md").read_text()
        assert "## [Unreleased]" in changelog or f"## [{tortoise_auth.__version__}]" in changelog

    def test_root_exports_what_it_says(self) -> None:
        """``__all__`` is sorted, and each of its names exists."""
        assert sorted(tortoise_auth.__all__) == tortoise_auth.__all__
        assert all(hasattr(tortoise_auth, name) for name in tortoise_auth.__all__)
        assert isinstance(tortoise_auth.emitter, EventEmitter)
