"""A hostile process: ``python -m tests.security.flooder WHAT INIT_PORT ALLOC_PORT SERVER_KEY OWN_PUBLIC OWN_SECRET``.

It says ``flooding`` once it is under way, and goes on until it is killed. Where a key is needed it is one of its own.
"""

import itertools
import os
import socket
import sys
import time

import zmq

from kvbelt.wire.handshake import PROTOCOL_VERSION


def raw(port: int, data: bytes, times: int) -> None:
    """Connect, send bytes that are not ZeroMQ and close, this many times."""
    for _ in range(times):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(data)


def silent(ports: list[int]) -> None:
    """Hold connections open, half of them in the middle of a greeting, one byte at a time."""
    held = [socket.create_connection(("127.0.0.1", port)) for port in ports for _ in range(200)]
    under_way()
    greeting = itertools.cycle(b"\xff" + bytes(8) + b"\x7f\x03")
    while True:
        byte = bytes([next(greeting)])
        for number, connection in enumerate(held):
            try:
                if number % 2:
                    connection.sendall(byte)
            except OSError:
                held[number] = socket.create_connection(("127.0.0.1", ports[0]))
        time.sleep(0.05)


def messages(ports: list[int], server: str, public: str, secret: str) -> None:
    """Send as many invalid messages as the socket takes; with a key if one is given."""
    context = zmq.Context()
    dealers = []
    for port in ports:
        for _ in range(4):
            dealer = context.socket(zmq.DEALER)
            if public:
                dealer.curve_publickey, dealer.curve_secretkey = public.encode(), secret.encode()
                dealer.curve_serverkey = server.encode()
            dealer.connect(f"tcp://127.0.0.1:{port}")
            dealers.append(dealer)
    under_way()
    ours = bytes([*b"KB", PROTOCOL_VERSION])
    rubbish = [b"", ours + os.urandom(300), os.urandom(1000), b"KB\x07", bytes(20_000), ours + b"\x81\xa4type"]
    for number in itertools.count():
        for dealer in dealers:
            try:
                dealer.send_multipart([rubbish[number % len(rubbish)]] * (1 + number % 3), zmq.NOBLOCK)
            except zmq.Again:
                time.sleep(0.001)


def connections(ports: list[int], server: str, public: str, secret: str) -> None:
    """Make one handshake after another."""
    context = zmq.Context()
    under_way()
    while True:
        dealers = []
        for port in ports * 10:
            dealer = context.socket(zmq.DEALER)
            dealer.linger = 0
            dealer.curve_publickey, dealer.curve_secretkey = public.encode(), secret.encode()
            dealer.curve_serverkey = server.encode()
            dealer.connect(f"tcp://127.0.0.1:{port}")
            dealers.append(dealer)
        time.sleep(0.05)
        for dealer in dealers:
            dealer.close()


def under_way() -> None:
    """Tell the test that the flood has begun."""
    sys.stdout.write("flooding\n")
    sys.stdout.flush()


def main() -> None:
    """Flood until killed."""
    what, init_port, alloc_port, server, public, secret = sys.argv[1:]
    ports = [int(init_port), int(alloc_port)]
    match what:
        case "rubbish":
            raw(ports[0], b"GET / HTTP/1.1\r\n\r\n", 1)
            under_way()
            while True:
                for port in ports:
                    raw(port, os.urandom(200), 10)
        case "silence":
            silent(ports)
        case "messages":
            messages(ports, server, public, secret)
        case "handshakes":
            connections(ports, server, public, secret)


if __name__ == "__main__":
    main()
