"""Processes start in order, are watched, and end without a trace, however the supervisor ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.supervise import descendants
from broker.supervise.errors import NotReadyError, ProcessDiedError, StartError
from broker.supervise.processes import ProcessSpec, Supervisor
from broker.supervise.readiness import http_answers

PATIENCE_S = 20.0  # far beyond what any of these takes, even on a loaded machine

# Says where its end can be seen: it appends its name on SIGTERM.
POLITE = """
import pathlib, signal, sys
name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
def end(*_):
    with (folder / "ended").open("a") as ended:
        ended.write(name + " ")
    sys.exit()
signal.signal(signal.SIGTERM, end)
(folder / name).touch()
while True:
    signal.pause()
"""
DEAF = """
import pathlib, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[2], sys.argv[1]).touch()
while True:
    signal.pause()
"""
# Leaves a grandchild in a session of its own, where no signal to a group reaches it.
BROOD = """
import pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
path = pathlib.Path(sys.argv[2], sys.argv[1])
path.with_suffix(".tmp").write_text(str(child.pid))
path.with_suffix(".tmp").rename(path)
child.wait()
"""


def _python(name: str, program: str, folder: Path) -> ProcessSpec:
    return ProcessSpec(
        name=name,
        argv=(sys.executable, "-c", program, name, str(folder)),
        ready=(folder / name).exists,
        ready_timeout_s=PATIENCE_S,
        stop_timeout_s=PATIENCE_S,
    )


def _lives(pid: int) -> bool:
    return any(process.pid == pid for process, _ in descendants._table())


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "the condition was not met in time"
        os.sched_yield()


def test_processes_end_in_the_reverse_order_of_their_start(tmp_path: Path) -> None:
    with Supervisor(tmp_path / "logs") as supervisor:
        pids = [supervisor.start(_python(name, POLITE, tmp_path)) for name in ("first", "second", "third")]
        supervisor.check()
        assert all(_lives(pid) for pid in pids)
    assert (tmp_path / "ended").read_text().split() == ["third", "second", "first"]
    assert not any(_lives(pid) for pid in pids)


def test_a_process_deaf_to_sigterm_is_forced(tmp_path: Path) -> None:
    spec = _python("deaf", DEAF, tmp_path)
    with Supervisor(tmp_path / "logs") as supervisor:
        pid = supervisor.start(ProcessSpec(spec.name, spec.argv, ready=spec.ready, stop_timeout_s=0.1))
    assert not _lives(pid)


def test_grandchildren_in_other_sessions_end_too(tmp_path: Path) -> None:
    with Supervisor(tmp_path / "logs") as supervisor:
        supervisor.start(_python("brood", BROOD, tmp_path))
        grandchild = int((tmp_path / "brood").read_text())
        assert _lives(grandchild)
    _wait_until(lambda: not _lives(grandchild))


def test_a_grandchild_whose_parent_has_died_is_found_by_its_mark(tmp_path: Path) -> None:
    with Supervisor(tmp_path / "logs") as supervisor:
        supervisor.start(_python("brood", BROOD, tmp_path))
        grandchild = int((tmp_path / "brood").read_text())
        supervisor.kill("brood")
        assert _lives(grandchild)
    _wait_until(lambda: not _lives(grandchild))


def test_a_process_that_dies_is_named_with_its_status_and_the_end_of_its_log(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        supervisor.start(ProcessSpec("steady", (sys.executable, "-c", "import signal; signal.pause()")))
        dying = ProcessSpec(
            "dying",
            (sys.executable, "-c", "print('the disk is full'); raise SystemExit(3)"),
            ready=lambda: False,
            ready_timeout_s=PATIENCE_S,
        )
        with pytest.raises(ProcessDiedError, match=r"dying ended by itself \(exit status 3\)(?s:.*)the disk is full"):
            supervisor.start(dying)


def test_check_names_a_process_killed_by_a_signal(tmp_path: Path) -> None:
    with Supervisor(tmp_path / "logs") as supervisor:
        supervisor.start(_python("victim", POLITE, tmp_path))
        supervisor.check()
        supervisor.kill("victim")
        with pytest.raises(ProcessDiedError, match=r"victim ended by itself \(killed by SIGKILL\)"):
            supervisor.check()


def test_a_killed_process_can_be_started_again(tmp_path: Path) -> None:
    with Supervisor(tmp_path / "logs") as supervisor:
        spec = _python("service", POLITE, tmp_path)
        first = supervisor.start(spec)
        supervisor.kill("service")
        second = supervisor.start(spec)
        assert second != first
        supervisor.check()


def test_a_process_never_ready_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    program = "import signal; print('waiting for a licence', flush=True); signal.pause()"
    log = tmp_path / "slow.log"

    def printed_but_never_ready() -> bool:
        _wait_until(lambda: log.exists() and log.stat().st_size > 0)
        return False

    spec = ProcessSpec("slow", (sys.executable, "-c", program), ready=printed_but_never_ready, ready_timeout_s=0.0)
    with (
        Supervisor(tmp_path) as supervisor,
        pytest.raises(NotReadyError, match=r"slow runs but was not ready within 0 s(?s:.*)waiting for a licence"),
    ):
        supervisor.start(spec)


def test_a_program_that_does_not_exist_is_named(tmp_path: Path) -> None:
    spec = ProcessSpec("absent", ("no-such-program-anywhere",), ready=lambda: False, ready_timeout_s=PATIENCE_S)
    with Supervisor(tmp_path) as supervisor, pytest.raises(ProcessDiedError, match="cannot run no-such-program"):
        supervisor.start(spec)


def test_a_folder_that_does_not_exist_is_an_error_at_once(tmp_path: Path) -> None:
    spec = ProcessSpec("nowhere", (sys.executable, "-c", ""), cwd=tmp_path / "absent")
    with Supervisor(tmp_path) as supervisor, pytest.raises(StartError, match="nowhere could not be started"):
        supervisor.start(spec)


# A supervisor in a process of its own, to be ended in unkind ways.
SUPERVISING = """
import os, pathlib, signal, sys
from broker.supervise.processes import ProcessSpec, Supervisor
folder, program = pathlib.Path(sys.argv[1]), sys.argv[2]
with Supervisor(folder / "logs") as supervisor:
    pids = []
    for name in ("one", "two"):
        argv = (sys.executable, "-c", program, name, str(folder))
        pids.append(supervisor.start(ProcessSpec(name, argv, ready=(folder / name).exists, stop_timeout_s=20)))
    print(*pids, flush=True)
    while True:
        signal.pause()
"""


def _supervising(folder: Path, program: str = POLITE) -> tuple[subprocess.Popen[str], list[int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISING, str(folder), program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
    )
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()]


def test_children_end_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    process, pids = _supervising(tmp_path)
    assert len(pids) == 2
    assert all(_lives(pid) for pid in pids)
    process.kill()
    process.communicate()
    _wait_until(lambda: not any(_lives(pid) for pid in pids))
    assert sorted((tmp_path / "ended").read_text().split()) == ["one", "two"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_children_end_in_order_when_the_supervisor_is_asked_to_end(tmp_path: Path, number: signal.Signals) -> None:
    process, pids = _supervising(tmp_path)
    os.killpg(process.pid, number)  # as the terminal does, to the whole foreground group
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    assert not any(_lives(pid) for pid in pids)
    assert (tmp_path / "ended").read_text().split() == ["two", "one"]


def test_a_second_interrupt_cuts_patience_and_still_leaves_nothing(tmp_path: Path) -> None:
    process, pids = _supervising(tmp_path, DEAF)
    started_s = time.monotonic()
    process.send_signal(signal.SIGINT)
    while process.poll() is None and time.monotonic() < started_s + PATIENCE_S:
        process.send_signal(signal.SIGINT)
        os.sched_yield()
    process.communicate(timeout=PATIENCE_S)
    assert time.monotonic() - started_s < PATIENCE_S  # each deaf child alone would have been given 20 s
    _wait_until(lambda: not any(_lives(pid) for pid in pids))  # killed, and gone as soon as the kernel is done


@pytest.mark.parametrize("delay_steps", [0, 3, 10, 30, 100, 300])
def test_an_interrupt_at_any_moment_of_the_start_leaves_nothing(tmp_path: Path, delay_steps: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISING, str(tmp_path), POLITE],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    _wait_until((tmp_path / "logs").exists)
    seen: set[descendants.Process] = set()
    for _ in range(delay_steps):
        seen |= descendants.descendants({process.pid})
    process.send_signal(signal.SIGINT)
    seen |= descendants.descendants({process.pid})
    process.wait(timeout=PATIENCE_S)
    _wait_until(lambda: not seen & {present for present, _ in descendants._table()})


def test_a_probe_says_no_to_what_is_not_there() -> None:
    assert not http_answers("127.0.0.1", 1)()


def test_http_is_ready_once_it_answers(tmp_path: Path) -> None:
    program = """
import http.server, pathlib, sys
server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
path = pathlib.Path("port.tmp"); path.write_text(str(server.server_port)); path.rename("port")
server.serve_forever()
"""
    with Supervisor(tmp_path) as supervisor:
        supervisor.start(
            ProcessSpec("web", (sys.executable, "-c", program), cwd=tmp_path, ready=(tmp_path / "port").exists)
        )
        port = int((tmp_path / "port").read_text())
        _wait_until(http_answers("127.0.0.1", port))
        assert not http_answers("127.0.0.1", port, "/absent")()
    assert not http_answers("127.0.0.1", port)()
