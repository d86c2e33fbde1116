"""grpcio: calls on one channel, one after the other, beside a stream that ends with each process and is asked for again.
Prints a line: calls answered, calls lost, streams ended by their process, streams lost."""

import sys
import threading
import time

import grpc

address, seconds = sys.argv[1], float(sys.argv[2])
end = time.monotonic() + seconds
calls, streams = [0, 0], [0, 0]
# The messages as bytes: an empty request, and `status: SERVING`.
SERVING = b"\x08\x01"


def count(counts, good):
    counts[0 if good else 1] += 1


def watch(channel):
    method = channel.unary_stream("/grpc.health.v1.Health/Watch")
    while time.monotonic() < end:
        begun, said = False, None
        try:
            for message in method(b"", timeout=seconds + 20):
                begun = message == SERVING
        except grpc.RpcError as error:
            said = (error.code(), error.details())
        if time.monotonic() >= end:
            return
        good = begun and said == (grpc.StatusCode.UNAVAILABLE, "this process ends: call again")
        count(streams, good)
        if not good:
            print("a stream ended:", said, file=sys.stderr)


with grpc.insecure_channel(address, options=[("grpc.enable_retries", 0)]) as channel:
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    threading.Thread(target=watch, args=[channel], daemon=True).start()
    while time.monotonic() < end:
        try:
            count(calls, check(b"", timeout=20) == SERVING)
        except grpc.RpcError as error:
            print(error.code(), error.details(), file=sys.stderr)
            count(calls, False)
    print(*calls, *streams)
