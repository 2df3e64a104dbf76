"""The hub: one TCP connection of every process to the first, which knows who came and who is gone.

`jax.distributed` aborts with a stack dump where a process does not come or dies, and names none.
The hub is there before it: it calls the roll, carries short texts between the processes, agrees on
the point where all of them stop, and tells everyone at once who was lost and why.

Messages are JSON objects, one a line. Of a process to the hub: hello, gather, stop, at, failed,
bye, beat. Of the hub to all: all, refused, gathered, halt, safe, lost, done, beat.
"""

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from typing import Any, NamedTuple

LOST = 75  # exit code where another process was lost: all have to be started again (EX_TEMPFAIL)
TICK = 1.0  # seconds between two looks at the connections
BEAT = 5  # ticks between two signs of life
SILENT = 40  # ticks without one after which a process counts as lost
LINGER = 120  # ticks that the others may go on after one process has ended


class Member(NamedTuple):
    """One process of the run."""

    process: int
    host: str

    def __str__(self) -> str:
        return f"process {self.process} ({self.host})"


class Line:
    """A socket that carries JSON objects, one a line."""

    def __init__(self, sock: socket.socket):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._file, self._lock = sock, sock.makefile("rb"), threading.Lock()

    def send(self, message: dict[str, Any]) -> bool:
        """False where the other end is gone."""
        try:
            with self._lock:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> dict[str, Any] | None:
        """The next message; None where the other end is gone or talks of something else."""
        try:
            line = self._file.readline()
            message = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._file.close()
        self._socket.close()


class Hub:
    """The end of the first process; threads that live as long as the process does."""

    def __init__(self, address: tuple[str, int], processes: int, timeout: float):
        try:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            self._server = socket.create_server(
                ("", address[1]), family=family, backlog=processes, dualstack_ipv6=both
            )
        except OSError as error:
            raise ValueError(
                f"process 0: port {address[1]} is not free ({error.strerror}): another run on this "
                "machine? give another port in --coordinator"
            ) from None
        self._address, self._processes, self._timeout = address, processes, timeout
        self._lines: dict[int, Line] = {}
        self._members: dict[int, Member] = {}
        self._heard: dict[int, int] = {}
        self._texts: dict[int, tuple[str, dict[int, str]]] = {}  # by number: what, and of whom
        self._polls: dict[int, int] = {}
        self._asked: dict[int, int] = {}
        self._done: dict[int, int] = {}  # process -> tick of its bye
        self._tick, self._gone, self._over = 0, 0, False
        self._lock = threading.RLock()
        for task in (self._listen, self._watch):
            threading.Thread(target=task, daemon=True, name=f"hub {task.__name__}").start()

    def _listen(self) -> None:
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(Line(sock),), daemon=True).start()

    def _serve(self, line: Line) -> None:
        hello = line.receive()
        if hello is None or hello.get("op") != "hello":
            line.close()  # a port scanner or the like
            return
        member = Member(int(hello["process"]), str(hello["host"]))
        if problem := self._join(member, int(hello["processes"]), line):
            line.send({"op": "refused", "why": problem})
            line.close()
            return
        while (message := line.receive()) is not None:
            with self._lock:
                self._heard[member.process] = self._tick
                self._handle(member, message)
        with self._lock:
            if member.process not in self._done:
                self._lose(member, "died", LOST)
            self._gone += 1
        line.close()

    def _join(self, member: Member, processes: int, line: Line) -> str:
        """Enter a process on the roll; what is wrong with it, or "" where nothing is."""
        with self._lock:
            if processes != self._processes:
                return f"{member} counts {processes} processes, process 0 {self._processes}"
            if member.process in self._members:
                there = self._members[member.process]
                return f"{there} is there already, and comes again from {member.host}"
            if self._over:
                return f"{member}: the run is over"
            self._members[member.process] = member
            self._lines[member.process] = line
            self._heard[member.process] = self._tick
            if len(self._members) == self._processes:
                self._heard = dict.fromkeys(self._members, self._tick)
                hosts = [self._members[i].host for i in range(self._processes)]
                self._tell({"op": "all", "hosts": hosts})
        return ""

    def _handle(self, member: Member, message: dict[str, Any]) -> None:
        op, process = message.get("op"), member.process
        if op == "gather":
            number, what = message["number"], message["what"]
            there, texts = self._texts.setdefault(number, (what, {}))
            if what != there:
                other = self._members[next(iter(texts))]
                why = f"is at {what!r} where {other} is at {there!r}: another program or command?"
                self._lose(member, why, 2)
                return
            texts[process] = message["text"]
            if len(texts) == self._processes:
                del self._texts[number]
                ordered = [texts[i] for i in range(self._processes)]
                self._tell({"op": "gathered", "texts": ordered})
        elif op == "stop":
            if not self._asked:
                self._tell({"op": "halt"})
            self._asked.setdefault(process, message["signal"])
        elif op == "at":
            self._polls[process] = message["polls"]
            if len(self._polls) == self._processes:
                (asked, number), *_ = self._asked.items()
                safe = max(self._polls.values()) + 1
                who = str(self._members[asked])
                self._tell({"op": "safe", "polls": safe, "who": who, "signal": number})
        elif op == "failed":
            self._lose(member, message["why"], message["code"])
        elif op == "bye":
            self._done[process] = self._tick
            if len(self._done) == self._processes:
                self._over = True
                self._tell({"op": "done"})

    def _lose(self, member: Member, why: str, code: int) -> None:
        """Tell everyone, once: what follows from it is no news."""
        if self._over:
            return
        self._over = True
        self._tell(
            {"op": "lost", "process": member.process, "who": f"{member} {why}", "code": code}
        )

    def _tell(self, message: dict[str, Any]) -> None:
        # Process 0 last: it may end on hearing this, and the hub with it.
        for process in sorted(self._lines, reverse=True):
            self._lines[process].send(message)

    def _watch(self) -> None:
        # Ticks and not the clock: where the whole machine stood still, nobody was silent.
        while True:
            time.sleep(TICK)
            with self._lock:
                self._tick += 1
                if self._over and self._gone == len(self._members):
                    with contextlib.suppress(OSError):
                        self._server.shutdown(socket.SHUT_RDWR)  # ends `_listen`
                    self._server.close()
                    return
                if len(self._members) < self._processes:
                    if self._tick * TICK > self._timeout and not self._over:
                        self._over = True
                        self._tell({"op": "refused", "why": self._absent()})
                    continue
                if self._tick % BEAT == 0:
                    self._tell({"op": "beat"})
                for process, tick in self._heard.items():
                    if process not in self._done and self._tick - tick > SILENT:
                        why = f"gave no sign of life for {SILENT * TICK:.0f} s"
                        self._lose(self._members[process], why, LOST)
                for process, tick in self._done.items():
                    if self._tick - tick > LINGER:
                        self._lose(self._members[process], "ended while others went on", LOST)

    def _absent(self) -> str:
        missing = [str(i) for i in range(self._processes) if i not in self._members]
        came = ", ".join(str(self._members[i]) for i in sorted(self._members))
        host, port = self._address
        return (
            f"{len(self._members)} of {self._processes} processes came to {host}:{port} within "
            f"{self._timeout:.0f} s; missing: process {', '.join(missing)}; here: {came}"
        )


class Connection:
    """The end of every process, of the first too."""

    def __init__(self, address: tuple[str, int], me: Member, processes: int, timeout: float):
        self.me, self.processes = me, processes
        self.hosts: list[str] = []
        self._line = _reach(address, me, timeout)
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._number, self._polls, self._heard, self._tick = 0, 0, 0, 0
        self._safe: int | None = None
        self._asked = self._leaving = False
        self.stopped_by, self.stop_signal = "", 0
        self._gate = threading.Lock()  # held while all agree where to stop: nobody polls meanwhile
        self._done = threading.Event()
        hello = {"op": "hello", "process": me.process, "host": me.host, "processes": processes}
        self._line.send(hello)
        reply = self._line.receive()
        if reply is None or reply["op"] != "all":
            self._line.close()
            gone = f"{me}: process 0 at {_shown(address)} has gone"
            raise ValueError(gone if reply is None else reply["why"])
        self.hosts = reply["hosts"]
        for task in (self._read, self._beat):
            threading.Thread(target=task, daemon=True, name=f"hub {task.__name__}").start()

    def gather(self, what: str, text: str) -> list[str]:
        """The texts of all processes, in their order; each calls this for the same things."""
        self._number += 1
        self._line.send({"op": "gather", "number": self._number, "what": what, "text": text})
        return self._answers.get()["texts"]

    def stopping(self, number: int) -> bool:
        """Whether all processes stop at this call, counted from the first; number: a signal seen.

        Every process has to call this at the same places of the same program.
        """
        if number and not self._asked:
            self._asked = True
            self._line.send({"op": "stop", "signal": number})
        with self._gate:
            self._polls += 1
            return self._safe is not None and self._polls >= self._safe

    def failed(self, why: str, code: int) -> None:
        """Tell the others why this process ends; returns when it has been told."""
        self._leaving = True
        self._line.send({"op": "failed", "why": why, "code": code})
        self._done.wait(5 * TICK)
        if self.me.process == 0:
            time.sleep(TICK)  # the hub goes with it: let the others read

    def bye(self) -> None:
        """This process is done; returns when all of them are."""
        self._line.send({"op": "bye"})
        self._done.wait()

    def _read(self) -> None:
        while (message := self._line.receive()) is not None:
            self._heard, op = self._tick, message["op"]
            if op == "gathered":
                self._answers.put(message)
            elif op == "halt":
                self._gate.acquire()
                self._line.send({"op": "at", "polls": self._polls})
            elif op == "safe":
                self._safe = message["polls"]
                self.stopped_by, self.stop_signal = message["who"], message["signal"]
                self._gate.release()
            elif op == "done":
                self._done.set()
                self._line.close()
                return
            elif op == "lost":
                if message["process"] == self.me.process and self._leaving:
                    self._done.set()
                    self._line.close()
                    return
                self._leave(message["who"], message["code"])
        self._leave(f"{Member(0, self.hosts[0])} died", LOST)

    def _leave(self, who: str, code: int) -> None:
        text = f"error: {who}; {self.me} of {self.processes} ends"
        # One write and nothing else: jax's own clients may abort the process at any moment.
        os.write(2, text.encode() + b"\n")
        if self.me.process == 0:
            time.sleep(TICK)  # the others have to hear of it from the hub here
        sys.stdout.flush()
        os._exit(code)

    def _beat(self) -> None:
        while not self._done.wait(TICK):
            self._tick += 1
            if self._tick % BEAT == 0:
                self._line.send({"op": "beat"})
            if self._tick - self._heard > SILENT:
                why = f"gave no sign of life for {SILENT * TICK:.0f} s"
                self._leave(f"{Member(0, self.hosts[0])} {why}", LOST)


def _reach(address: tuple[str, int], me: Member, timeout: float) -> Line:
    """A connection to the hub, which may come up later than this process."""
    end = time.monotonic() + timeout
    while True:
        try:
            sock = socket.create_connection(address, timeout=5)
            sock.settimeout(None)
            return Line(sock)
        except OSError as error:
            if time.monotonic() > end:
                reason = error.strerror or str(error)
                raise ValueError(
                    f"{me}: no answer from process 0 at {_shown(address)} within {timeout:.0f} s "
                    f"({reason}): does it run there, and is the port open between the hosts?"
                ) from None
        time.sleep(0.2)


def _shown(address: tuple[str, int]) -> str:
    return f"{address[0]}:{address[1]}"
