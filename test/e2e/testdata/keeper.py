"""A process that holds state in memory only and answers over a unix socket.

  keeper.py SOCKET MIB          serve
  keeper.py ask SOCKET REQUEST  ask once and print the answer
"""
import hashlib
import json
import os
import socket
import sys
import threading
import time


def ask(path, request):
    s = socket.socket(socket.AF_UNIX)
    s.connect(path)
    s.sendall(request.encode() + b"\n")
    s.shutdown(socket.SHUT_WR)
    answer = b""
    while piece := s.recv(65536):
        answer += piece
    print(answer.decode())


class Keeper:
    def __init__(self, mib):
        self.born = os.urandom(16).hex()
        self.blob = bytearray(os.urandom(mib << 20))
        self.made = hashlib.md5(self.blob).hexdigest()
        self.state = {"value": "first", "table": {str(i): i * i for i in range(10000)}}
        self.counter = 0

    def count(self):
        while True:
            self.counter += 1
            time.sleep(0.1)

    def answer(self, request):
        verb, _, rest = request.partition(" ")
        error = ""
        if verb == "set":
            self.state["value"] = rest
        elif verb == "remake":
            # Every page of the data changes.
            self.blob = bytearray(os.urandom(len(self.blob)))
            self.made = hashlib.md5(self.blob).hexdigest()
        elif verb != "stat":
            error = "unknown request " + verb
        for i in range(0, 10000, 97):
            if self.state["table"][str(i)] != i * i:
                error = f"entry {i} of the table is wrong"
        return json.dumps({
            "pid": os.getpid(),
            "born": self.born,
            "blob": hashlib.md5(self.blob).hexdigest(),
            "made": self.made,
            "counter": self.counter,
            "value": self.state["value"],
            "error": error,
        })

    def serve(self, path):
        threading.Thread(target=self.count, daemon=True).start()
        s = socket.socket(socket.AF_UNIX)
        s.bind(path + ".new")
        s.listen(16)
        os.rename(path + ".new", path)  # there when it answers
        while True:
            c, _ = s.accept()
            request = b""
            while piece := c.recv(65536):
                request += piece
            c.sendall(self.answer(request.decode().strip()).encode())
            c.close()


if sys.argv[1] == "ask":
    ask(sys.argv[2], sys.argv[3])
else:
    Keeper(int(sys.argv[2])).serve(sys.argv[1])
