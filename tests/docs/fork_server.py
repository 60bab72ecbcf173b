"""`switchcli` from forks of one process that has imported it: `python fork_server.py SOCKET` serves, `CLIENT` asks.

A page has up to 20 commands, each of which would import torch and transformers for seconds.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

from terminal import exit_code, import_what_verbs_call, run_switchcli

CLIENT = """\
import json, os, socket
def ask(words):
    with socket.socket(socket.AF_UNIX) as server:
        server.connect({path!r})
        request = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(server, [request[:1]], [0, 1, 2])
        server.sendall(request[1:])
        server.shutdown(socket.SHUT_WR)
        os._exit(int(server.recv(16) or b"1"))
"""
"""A Python program whose `ask(words)` runs a command with the streams, folder and variables of its own process."""


def serve(path: str) -> NoReturn:
    """Answer requests until the process is killed."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                _answer(connection)
            connection.close()
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                time.sleep(0.01)


def _answer(connection: socket.socket) -> NoReturn:
    """In a fork: run the command in another, and send its exit code."""
    begin, streams, _, _ = socket.recv_fds(connection, 1, 3)
    words, folder, environment = json.loads(begin + b"".join(iter(lambda: connection.recv(1 << 16), b"")))
    child = os.fork()
    if child == 0:
        connection.close()
        run_switchcli(words, Path(folder), streams, environment)
    connection.sendall(str(exit_code(child) % 256).encode())
    os._exit(0)


if __name__ == "__main__":
    import_what_verbs_call()
    Path(f"{sys.argv[1]}.ready").touch()
    serve(sys.argv[1])
