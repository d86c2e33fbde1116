"""grpcio: calls on one channel, one after the other, and one stream beside them, until standard input ends. For each line
of standard input it prints "answered", as soon as a call that began after the line was answered, and "watching" for each
message of the stream. At its end it prints a line: calls answered, calls lost, messages of the stream, and how often the
stream has ended."""

import signal
import sys
import threading

import grpc

address, limit = sys.argv[1], int(sys.argv[2])
# So that a test that hangs does not leave this process behind.
signal.alarm(limit)
calls, stream = [0, 0], [0, 0]
asked = reported = 0
ends = threading.Event()
# The encoded response `status: SERVING`; the encoded request is empty.
SERVING = b"\x08\x01"


def write_line(*words):
    # In one write, because both threads write.
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def count(counts, good):
    counts[0 if good else 1] += 1


def watch(channel):
    try:
        for message in channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=limit):
            stream[0] += message == SERVING
            write_line("watching")
        end = "without an error"
    except grpc.RpcError as error:
        end = (error.code(), error.details())
    if not ends.is_set():
        stream[1] += 1
        print("the stream ended:", end, file=sys.stderr)


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
        while good and reported < until:
            write_line("answered")
            reported += 1
    write_line(*calls, *stream)
