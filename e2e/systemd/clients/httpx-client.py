"""httpx, one request after the other, until standard input ends. For each line of standard input it prints "answered",
as soon as a request that began after the line was answered. At its end it prints a line: answered, lost, connections
opened."""

import signal
import sys
import threading

import httpx

url, limit, protocol, roots = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
# So that a test that hangs does not leave this process behind.
signal.alarm(limit)
answered = lost = made = asked = reported = 0
ends = False


def trace(event, _):
    global made
    made += event == "connection.connect_tcp.complete"


def listen():
    global asked, ends
    for _ in sys.stdin:
        asked += 1
    ends = True


threading.Thread(target=listen, daemon=True).start()
with httpx.Client(
    http1=protocol == "HTTP/1.1", http2=protocol == "HTTP/2", verify=roots, timeout=60
) as client:
    is_last = False
    while not is_last:
        is_last, until = ends, asked
        try:
            answer = client.post(url, content=b"x" * 1024, extensions={"trace": trace})
            good = (answer.status_code, answer.http_version) == (200, protocol)
        except httpx.HTTPError as error:
            print(repr(error), file=sys.stderr)
            good = False
        answered, lost = answered + good, lost + (not good)
        while good and reported < until:
            print("answered", flush=True)
            reported += 1
print(answered, lost, made)
