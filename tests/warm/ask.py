"""What stands for one command: `ask.py INTERPRETER SOCKET WORDS`. The standard library only, and little of it."""

import json
import os
import signal
import socket
import sys


def main() -> None:
    interpreter, address, *words = sys.argv[1:]
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.connect(address)
    asked = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
    socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: server.send(bytes([number])))
    answer = server.recv(100)
    if answer == b"cold":
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        os.execv(interpreter, [interpreter, *words])
    status = int(answer or -signal.SIGKILL)  # no answer: the server is gone
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


main()
