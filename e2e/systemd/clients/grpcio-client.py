"""grpcio: calls on one channel, one after the other, beside a stream that ends with each process and is asked for again,
until standard input ends. For each line of standard input it writes "answered", as soon as a call that began since then
was answered; for each stream "watching", once it has begun. At its end it prints a line: calls answered, calls lost,
streams ended by their process, streams lost."""

import signal
import sys
import threading

import grpc

address, limit = sys.argv[1], int(sys.argv[2])
# A test that hangs does not leave this process behind.
signal.alarm(limit)
calls, streams = [0, 0], [0, 0]
asked = told = 0
ends = threading.Event()
# The messages as bytes: an empty request, and `status: SERVING`.
SERVING = b"\x08\x01"


def say(*words):
    # In one piece: both threads write.
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def count(counts, good):
    counts[0 if good else 1] += 1


def watch(channel):
    method = channel.unary_stream("/grpc.health.v1.Health/Watch")
    while not ends.is_set():
        begun, said = False, None
        try:
            for message in method(b"", timeout=limit):
                begun = message == SERVING
                if begun:
                    say("watching")
        except grpc.RpcError as error:
            said = (error.code(), error.details())
        if ends.is_set():
            return
        good = begun and said == (grpc.StatusCode.UNAVAILABLE, "this process is shutting down: call again")
        count(streams, good)
        if not good:
            print("a stream ended:", said, file=sys.stderr)


def listen():
    global asked
    for _ in sys.stdin:
        asked += 1
    ends.set()


with grpc.insecure_channel(address, options=[("grpc.enable_retries", 0)]) as channel:
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    threading.Thread(target=watch, args=[channel], daemon=True).start()
    threading.Thread(target=listen, daemon=True).start()
    is_last = False
    while not is_last:
        is_last, until = ends.is_set(), asked
        try:
            good = check(b"", timeout=60) == SERVING
        except grpc.RpcError as error:
            print(error.code(), error.details(), file=sys.stderr)
            good = False
        count(calls, good)
        while good and told < until:
            say("answered")
            told += 1
    say(*calls, *streams)
