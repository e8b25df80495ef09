"""Threads: bounded, counted when stuck, ended when idle, and no obstacle to the end of the program."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from textwrap import dedent

import pytest

from tortoise_auth.threads import Threads, ThreadsStuckError, usable_cpus

PATIENCE = 10.0


class Blocked:
    """Calls that go on until they are released."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._release = threading.Event()
        self.began = threading.Semaphore(0)

    def begin(self) -> Future[bool]:
        """Begin a call, and wait until it runs."""
        call = self._threads.submit(self._work)
        assert self.began.acquire(timeout=PATIENCE)
        return call

    def release(self) -> None:
        """Let the calls end."""
        self._release.set()

    def _work(self) -> bool:
        self.began.release()
        return self._release.wait(PATIENCE)


class TestBound:
    def test_no_more_than_its_size(self) -> None:
        """A call that arrives while all threads are busy waits for one."""
        threads = Threads(2, "t")
        blocked = Blocked(threads)
        calls = [blocked.begin(), blocked.begin()]
        waiting = threads.submit(threading.get_ident)
        assert not waiting.done()
        blocked.release()
        assert waiting.result(PATIENCE)
        assert all(call.result(PATIENCE) for call in calls)

    def test_one_thread_is_enough_for_calls_one_after_the_other(self) -> None:
        """An idle thread is reused."""
        threads = Threads(5, "t")
        idents = set()
        for _ in range(20):
            idents.add(threads.submit(threading.get_ident).result(PATIENCE))
            while threads._idle == 0:
                time.sleep(0)
        assert len(idents) == 1

    def test_failures_of_any_class(self) -> None:
        """An error of a call is raised where it is awaited, and the thread goes on."""

        def fail() -> None:
            raise SystemExit(3)

        threads = Threads(1, "t")
        with pytest.raises(SystemExit):
            threads.submit(fail).result(PATIENCE)
        assert threads.submit(lambda: 7).result(PATIENCE) == 7


class TestStuck:
    def test_all_threads_stuck(self) -> None:
        """While every thread runs an abandoned call, the next call fails at once."""
        threads = Threads(2, "t")
        blocked = Blocked(threads)
        calls = [blocked.begin(), blocked.begin()]
        threads.give_up(calls[0])
        waiting = threads.submit(lambda: 1)  # one thread may still become free
        threads.give_up(calls[1])
        firsts = []
        for _ in range(3):
            with pytest.raises(ThreadsStuckError, match="2 earlier calls") as refused:
                threads.submit(lambda: 2)
            firsts.append(refused.value.first)
        assert firsts == [True, False, False]
        blocked.release()
        assert waiting.result(PATIENCE) == 1
        assert [call.result(PATIENCE) for call in calls] == [True, True]
        assert threads.submit(lambda: 3).result(PATIENCE) == 3

    def test_what_has_not_begun_does_not_begin(self) -> None:
        """A call that is cancelled while it waits never runs."""
        threads, ran = Threads(1, "t"), list[int]()
        blocked = Blocked(threads)
        blocked.begin()
        late = threads.submit(lambda: ran.append(1))
        threads.give_up(late)
        blocked.release()
        assert threads.submit(lambda: 2).result(PATIENCE) == 2
        assert ran == []


class TestEnd:
    def test_idle_threads_end(self) -> None:
        """An idle thread ends after its time, and the next call starts another."""
        threads = Threads(1, "t", idle=0.001)
        assert threads.submit(lambda: 1).result(PATIENCE) == 1
        ends = time.monotonic() + PATIENCE
        while not threads.is_unused and time.monotonic() < ends:
            time.sleep(0.001)
        assert threads.is_unused
        assert threads.submit(lambda: 2).result(PATIENCE) == 2

    def test_does_not_wait_for_what_hangs(self) -> None:
        """An abandoned call does not delay the end of the process; one in flight may end first."""
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                dedent("""
                    import threading, time
                    from tortoise_auth.threads import Threads
                    threads = Threads(1, "t")
                    begun = threading.Event()
                    call = threads.submit(lambda: (begun.set(), time.sleep(3600)))
                    begun.wait()
                    threads.give_up(call)
                    others = Threads(1, "t")
                    others.submit(lambda: (time.sleep(0.2), print("ended", flush=True)))
                """),
            ],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        assert done.stdout == "ended\n"


class TestUsableCpus:
    """How many threads of work run at once."""

    @pytest.mark.parametrize(
        ("files", "cpus"),
        [
            ({"cpu.max": "max 100000"}, 8),
            ({"cpu.max": "100000 100000"}, 1),
            ({"cpu.max": "150000 100000"}, 2),
            ({"cpu.max": "1000 100000"}, 1),
            ({"cpu.max": "6400000 100000"}, 8),
            ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
            ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
            ({"cpu.max": "nonsense"}, 8),
            ({}, 8),
        ],
    )
    def test_quota(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cpus: int
    ) -> None:
        """The quota of a container counts, of both versions of cgroups, rounded up."""
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text + "\n")
        assert usable_cpus(tmp_path) == cpus

    def test_affinity(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One usable CPU of a host of 64 is one; without affinity all of the host count."""
        monkeypatch.setattr(os, "cpu_count", lambda: 64)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
        assert usable_cpus(tmp_path) == 1
        monkeypatch.delattr(os, "sched_getaffinity")
        assert usable_cpus(tmp_path) == 64
