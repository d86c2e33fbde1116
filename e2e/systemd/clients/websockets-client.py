"""websockets with its default settings: one WebSocket, until standard input ends. For each line of standard input it
prints "answered", as soon as a message that was sent after the line has come back. At its end it prints a line: echoes,
Pongs, messages whose echo was missing or another one, WebSockets closed before the end."""

import asyncio
import signal
import ssl
import sys
import threading

import websockets

url, limit, roots = sys.argv[1], int(sys.argv[2]), sys.argv[3]
LENGTHS = (5, 130, 70_000)
WINDOW = 4
# So that a test that hangs does not leave this process behind.
signal.alarm(limit)
answered = pongs = lost = closed = asked = reported = 0
ends = False


def listen():
    global asked, ends
    for _ in sys.stdin:
        asked += 1
    ends = True


def content(number):
    text = f"{number % 100_000:05}"
    return (text * (LENGTHS[number % 3] // 5 + 1))[: LENGTHS[number % 3]]


async def send(socket, sent, window):
    """Sends messages, every fourth in three frames, and a Ping with every fifth."""
    global pongs
    number = 0
    while not ends:
        await window.acquire()
        await sent.put((number, asked))
        text = content(number)
        third = len(text) // 3
        parts = [text[:third], text[third : 2 * third], text[2 * third :]]
        await socket.send(parts if number % 4 == 1 else text)
        if number % 5 == 0:
            await (await socket.ping())
            pongs += 1
        number += 1
    await sent.put(None)


async def receive(socket, sent, window):
    global answered, lost, reported
    while (message := await sent.get()) is not None:
        number, until = message
        echo = await socket.recv()
        good = echo == content(number)
        answered, lost = answered + good, lost + (not good)
        window.release()
        while good and reported < until:
            print("answered", flush=True)
            reported += 1


async def run():
    global closed, lost
    context = ssl.create_default_context(cafile=roots) if url.startswith("wss:") else None
    async with websockets.connect(url, ssl=context) as socket:
        sent, window = asyncio.Queue(), asyncio.Semaphore(WINDOW)
        try:
            await asyncio.gather(send(socket, sent, window), receive(socket, sent, window))
            # Another message would be an echo that was sent twice.
            await socket.send("end")
            lost += await socket.recv() != "end"
        except websockets.ConnectionClosed as error:
            print(repr(error), file=sys.stderr)
            closed += 1


threading.Thread(target=listen, daemon=True).start()
asyncio.run(run())
print(answered, pongs, lost, closed)
