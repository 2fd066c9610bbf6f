"""Reads orders once, keeps what it learned in memory, and answers questions.

The file is not looked at again: an answer after a pause, or in a clone, comes
from the memory of this very process.
"""
import collections
import csv
import os
import socket
import sys

customers = collections.defaultdict(float)
articles = collections.Counter()
total = 0.0
rows = 0
with open(sys.argv[1], newline="") as f:
    for order in csv.DictReader(f):
        worth = int(order["count"]) * float(order["price"])
        customers[order["customer"]] += worth
        articles[order["article"]] += int(order["count"])
        total += worth
        rows += 1
os.remove(sys.argv[1])
best = max(customers, key=customers.get)
summary = (f"{rows} orders worth {total:.2f}, {len(customers)} customers, "
           f"best {best}, most sold {articles.most_common(1)[0][0]}")

server = socket.create_server(("127.0.0.1", 7000))
with open("/tmp/ready", "w") as ready:
    print(os.getpid(), file=ready)
while True:
    peer, _ = server.accept()
    with peer, peer.makefile("rw") as talk:
        question = talk.readline().strip()
        answers = {
            "summary": lambda: summary,
            "pid": lambda: str(os.getpid()),
            "random": lambda: os.urandom(16).hex(),
        }
        print(answers.get(question, lambda: "what?")(), file=talk)
