"""Hold packets back for a while, and lose some: `python -I delay.py QUEUE:DELAY_S:LOSS:SEED ...`. Standard library only.

Many kernels have no netem. They do have NFQUEUE: the packets stay in the kernel, and this process only says when
each may go on. It asks for their numbers alone, keeps what is due in order, and answers in batches, so that a
gigabit costs a few hundredths of a core. Packets are counted and lost one by one, never as the
kernel's large segments, because a lost segment of 64 KiB would be forty lost packets to TCP.

Speaks netlink by hand (linux/netfilter/nfnetlink_queue.h). Prints `ready` once every queue is bound; ends on SIGTERM.
If it dies, its links are dark: queued packets without a listener are dropped.
"""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from typing import NoReturn

NETLINK_NETFILTER = 12
SUBSYSTEM_QUEUE = 3 << 8
MESSAGE_PACKET, MESSAGE_VERDICT, MESSAGE_CONFIG, MESSAGE_VERDICT_BATCH = 0, 1, 2, 3
REQUEST, ACKNOWLEDGE = 1, 4
ATTRIBUTE_COMMAND, ATTRIBUTE_PARAMETERS, ATTRIBUTE_LENGTH_MAX, ATTRIBUTE_MASK, ATTRIBUTE_FLAGS = 1, 2, 3, 4, 5
ATTRIBUTE_VERDICT_HEADER = 2
COMMAND_BIND = 1
COPY_NUMBERS = 1
FLAG_SEGMENTS_WHOLE = 1 << 2
DROP, ACCEPT = 0, 1
SOL_NETLINK, NO_ENOBUFS = 270, 5
SO_RCVBUFFORCE = 33
PACKETS_MAX = 65_536
BUFFER_BYTES = 8 << 20


class Queue:
    """One direction between two sites."""

    def __init__(self, number: int, delay_s: float, loss: float, seed: int) -> None:
        """Bind queue `number`. Raises OSError where the kernel refuses."""
        self.number, self.delay_s, self.loss = number, delay_s, loss
        self.due: deque[tuple[float, int]] = deque()
        self._chance = random.Random(seed)  # noqa: S311  the same packets are lost again in the next run
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self.socket.bind((0, 0))
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
        except PermissionError:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self.socket.setsockopt(SOL_NETLINK, NO_ENOBUFS, 1)
        # Without the flag the kernel cuts large segments into the packets that the wire would carry.
        self._configure(_attribute(ATTRIBUTE_COMMAND, struct.pack(">BBH", COMMAND_BIND, 0, socket.AF_INET)))
        self._configure(_attribute(ATTRIBUTE_PARAMETERS, struct.pack(">IB", 0, COPY_NUMBERS)))
        self._configure(_attribute(ATTRIBUTE_LENGTH_MAX, struct.pack(">I", PACKETS_MAX)))
        self._configure(
            _attribute(ATTRIBUTE_MASK, struct.pack(">I", FLAG_SEGMENTS_WHOLE))
            + _attribute(ATTRIBUTE_FLAGS, struct.pack(">I", 0))
        )
        self.socket.setblocking(False)

    def take(self, now_s: float) -> None:
        """Take the packets that have come; those that chance picks are dropped at once."""
        for _ in range(256):  # bounded, so that one busy queue does not starve the others
            try:
                block = self.socket.recv(65_536)
            except BlockingIOError:
                return
            offset = 0
            while offset + 20 <= len(block):
                length, kind = struct.unpack_from("=IH", block, offset)
                if kind == SUBSYSTEM_QUEUE | MESSAGE_PACKET:
                    # The header of the packet is the first attribute, its number the first field.
                    (packet,) = struct.unpack_from(">I", block, offset + 24)
                    if self.loss and self._chance.random() < self.loss:
                        self._answer(packet, DROP, MESSAGE_VERDICT)
                    else:
                        self.due.append((now_s + self.delay_s, packet))
                offset += (length + 3) & ~3

    def release(self, now_s: float) -> None:
        """Let everything go on whose time has come: the kernel takes all numbers up to the last one."""
        last = None
        while self.due and self.due[0][0] <= now_s:
            last = self.due.popleft()[1]
        if last is not None:
            self._answer(last, ACCEPT, MESSAGE_VERDICT_BATCH)

    def _answer(self, packet: int, verdict: int, kind: int) -> None:
        body = _attribute(ATTRIBUTE_VERDICT_HEADER, struct.pack(">II", verdict, packet))
        self.socket.send(_message(kind, self.number, body, REQUEST))

    def _configure(self, body: bytes) -> None:
        self.socket.send(_message(MESSAGE_CONFIG, self.number, body, REQUEST | ACKNOWLEDGE))
        (error,) = struct.unpack_from("=i", self.socket.recv(4096), 16)
        if error:
            raise OSError(-error, f"queue {self.number}: {os.strerror(-error)}")


def main(words: list[str]) -> NoReturn:
    """Serve the queues that `words` name until the end of the process."""
    queues = []
    for word in words:
        number, delay_s, loss, seed = word.split(":")
        queues.append(Queue(int(number), float(delay_s), float(loss), int(seed)))
    by_descriptor = {queue.socket.fileno(): queue for queue in queues}
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        next_s = min((queue.due[0][0] for queue in queues if queue.due), default=None)
        wait_s = None if next_s is None else max(0.0, next_s - time.monotonic())
        readable, _, _ = select.select(list(by_descriptor), [], [], wait_s)
        now_s = time.monotonic()
        for descriptor in readable:
            by_descriptor[descriptor].take(now_s)
        now_s = time.monotonic()
        for queue in queues:
            queue.release(now_s)


def _attribute(kind: int, data: bytes) -> bytes:
    length = 4 + len(data)
    return struct.pack("=HH", length, kind) + data + b"\0" * (-length % 4)


def _message(kind: int, queue: int, body: bytes, flags: int) -> bytes:
    header = struct.pack("=IHHII", 20 + len(body), SUBSYSTEM_QUEUE | kind, flags, 0, 0)
    return header + struct.pack(">BBH", 0, 0, queue) + body


if __name__ == "__main__":
    main(sys.argv[1:])
