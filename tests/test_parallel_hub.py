"""The hub: the roll, texts, the common stop, and who was lost; processes that are threads here."""

import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import free_port

from saro_jax.parallel import hub
from saro_jax.parallel.hub import Connection, Hub, Member


class Here(Connection):
    """A connection that notes what would end its process."""

    left: tuple[str, int] | None = None

    def _leave(self, who, code):
        self.left = self.left or (who, code)
        self._done.set()
        self._line.close()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(hub, "TICK", 0.02)


def meet(count, timeout=10.0):
    """A hub and its connections, in the order of the processes."""
    address = ("127.0.0.1", free_port())
    Hub(address, count, timeout)

    def one(i):
        return Here(address, Member(i, f"host{i}"), count, timeout)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def together(connections, call):
    with ThreadPoolExecutor(len(connections)) as pool:
        return list(pool.map(call, connections))


def end(connections):
    together(connections, lambda c: c.bye())


def wait_for(connection):
    assert connection._done.wait(10) and connection.left is not None
    return connection.left


def test_texts_come_back_in_the_order_of_the_processes(quick):
    connections = meet(3)
    for round in ("a", "b"):
        found = together(connections, lambda c, r=round: c.gather(r, f"{r}{c.me.process}"))
        assert found == [[f"{round}0", f"{round}1", f"{round}2"]] * 3
    assert connections[2].hosts == ["host0", "host1", "host2"]
    end(connections)
    assert not any(c.left for c in connections)


def test_other_questions_name_who_asks_them(quick):
    connections = meet(2)
    threading.Thread(target=connections[0].gather, args=("rows", ""), daemon=True).start()
    while not connections[0]._number:
        pass
    threading.Event().wait(0.1)
    threading.Thread(target=connections[1].gather, args=("clock", ""), daemon=True).start()
    who, code = wait_for(connections[0])
    assert code == 2
    assert who.startswith("process 1 (host1) is at 'clock' where process 0 (host0) is at 'rows'")


def test_all_stop_at_one_call(quick):
    connections = meet(3)

    def run(connection):
        # One asks at its fifth call; all run on at their own pace until the agreed one.
        for k in range(1, 10_000):
            number = 15 if connection.me.process == 1 and k == 5 else 0
            if connection.stopping(number):
                return k
            threading.Event().wait(0.001 * (1 + connection.me.process))
        return 0

    stopped = together(connections, run)
    assert len(set(stopped)) == 1 and stopped[0] > 5
    assert {(c.stopped_by, c.stop_signal) for c in connections} == {("process 1 (host1)", 15)}
    assert all(c.stopping(0) for c in connections)
    end(connections)


def test_without_a_signal_nobody_stops(quick):
    connections = meet(2)
    assert not any(c.stopping(0) for c in connections for _ in range(100))
    end(connections)


def test_the_dead_are_named(quick):
    connections = meet(3)
    connections[2]._line.close()  # what the kernel does for a process that is killed
    for connection in connections[:2]:
        assert wait_for(connection) == ("process 2 (host2) died", hub.LOST)


def test_an_error_ends_all_with_its_reason(quick):
    connections = meet(3)
    connections[1].failed("ended: no such row", 2)
    for i in (0, 2):
        assert wait_for(connections[i]) == ("process 1 (host1) ended: no such row", 2)
    assert connections[1].left is None


def test_the_silent_are_named(quick, monkeypatch):
    monkeypatch.setattr(hub, "SILENT", 10)
    connections = meet(2)
    # A machine without power: the connection stays, nothing comes.
    monkeypatch.setattr(connections[1]._line, "send", lambda _: True)
    who, code = wait_for(connections[0])
    assert code == hub.LOST and who.startswith("process 1 (host1) gave no sign of life")


def test_one_that_ends_while_others_go_on_is_named(quick, monkeypatch):
    monkeypatch.setattr(hub, "LINGER", 5)
    connections = meet(2)
    threading.Thread(target=connections[1].bye, daemon=True).start()
    assert wait_for(connections[0]) == ("process 1 (host1) ended while others went on", hub.LOST)


def test_the_missing_are_named(quick):
    address = ("127.0.0.1", free_port())
    Hub(address, 4, 0.2)

    def one(i):
        with pytest.raises(ValueError) as error:
            Here(address, Member(i, f"host{i}"), 4, 5.0)
        return str(error.value)

    with ThreadPoolExecutor(2) as pool:
        found = set(pool.map(one, (0, 2)))
    (line,) = found
    assert f"2 of 4 processes came to 127.0.0.1:{address[1]}" in line
    assert "missing: process 1, 3; here: process 0 (host0), process 2 (host2)" in line


def test_an_address_that_does_not_answer_is_named(quick):
    address = ("127.0.0.1", free_port())
    wanted = rf"process 1 \(host1\): no answer from process 0 at 127.0.0.1:{address[1]} within 0 s"
    with pytest.raises(ValueError, match=wanted):
        Here(address, Member(1, "host1"), 2, 0.3)


@pytest.mark.parametrize(
    ("member", "count", "why"),
    [
        (Member(0, "b"), 2, "process 0 (a) is there already, and comes again from b"),
        (Member(1, "b"), 3, "process 1 (b) counts 3 processes, process 0 2"),
    ],
)
def test_who_does_not_belong_is_told(quick, member, count, why):
    address = ("127.0.0.1", free_port())
    Hub(address, 2, 10.0)
    first = threading.Thread(target=Here, args=(address, Member(0, "a"), 2, 10.0), daemon=True)
    first.start()
    threading.Event().wait(0.2)
    with pytest.raises(ValueError, match=re.escape(why)):
        Here(address, member, count, 5.0)
    second = Here(address, Member(1, "c"), 2, 10.0)
    second.failed("ends the test", 1)


def test_a_port_that_is_taken_is_named():
    port = free_port()
    with (
        socket.create_server(("", port)),
        pytest.raises(ValueError, match=f"process 0: port {port} is not free"),
    ):
        Hub(("127.0.0.1", port), 2, 1.0)


def test_strangers_on_the_port_do_no_harm(quick):
    address = ("127.0.0.1", free_port())
    Hub(address, 1, 10.0)
    with socket.create_connection(address) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n")
        assert sock.recv(10) == b""
    connection = Here(address, Member(0, "a"), 1, 10.0)
    assert connection.gather("x", "y") == ["y"]
    end([connection])
