"""httpx, for so many seconds, one request after the other. Prints a line: answered, lost, connections made."""

import sys
import time

import httpx

url, seconds, protocol, roots = sys.argv[1], float(sys.argv[2]), sys.argv[3], sys.argv[4]
answered = lost = made = 0


def trace(event, _):
    global made
    made += event == "connection.connect_tcp.complete"


with httpx.Client(http1=protocol == "HTTP/1.1", http2=protocol == "HTTP/2", verify=roots) as client:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            answer = client.post(url, content=b"x" * 1024, extensions={"trace": trace})
            good = (answer.status_code, answer.http_version) == (200, protocol)
        except httpx.HTTPError as error:
            print(repr(error), file=sys.stderr)
            good = False
        answered, lost = answered + good, lost + (not good)
print(answered, lost, made)
