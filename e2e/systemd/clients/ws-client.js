// ws with its default settings: one WebSocket, until standard input ends. For each line of standard input it prints
// "answered", as soon as a message that was sent after the line has come back. At its end it prints a line: echoes, Pongs,
// messages and Pings whose answer was missing or another one, WebSockets closed before the end.

const { readFileSync } = require("node:fs");
const { createInterface } = require("node:readline");
const WebSocket = require("ws");

const [url, limit, roots] = process.argv.slice(2);
const LENGTHS = [5, 130, 70_000];
const WINDOW = 4;
const END = "end";
const counts = { echoes: 0, pongs: 0, lost: 0, closed: 0 };
let [messages, pings, asked, reported] = [0, 0, 0, 0];
let ends = false;
// For each message without an echo, the number of lines that had been read when it was sent.
const waiting = [];

// So that a test that hangs does not leave this process behind.
setTimeout(() => process.exit(1), Number(limit) * 1000);

function content(number) {
  const length = LENGTHS[number % LENGTHS.length];
  return String(number % 100_000).padStart(5, "0").repeat(Math.ceil(length / 5)).slice(0, length);
}

const isBinary = (number) => number % 2 === 1;

function ping() {
  socket.ping(String(pings));
  pings += 1;
}

// Sends a message: every fourth in three frames with a Ping before the last, and every fifth after a Ping.
function send(number) {
  const text = content(number);
  const third = Math.floor(text.length / 3);
  const part = (from, to, fin) => socket.send(text.slice(from, to), { binary: isBinary(number), fin });
  if (number % 5 === 0) ping();
  if (number % 4 === 1) {
    part(0, third, false);
    part(third, 2 * third, false);
    ping();
    part(2 * third, text.length, true);
  } else {
    part(0, text.length, true);
  }
}

function fillWindow() {
  while (!ends && waiting.length < WINDOW) {
    waiting.push(asked);
    send(messages);
    messages += 1;
  }
}

function receive(data, binary) {
  if (waiting.length === 0) {
    // Another message would be an echo that was sent twice.
    if (ends && String(data) === END) socket.close(1000); else counts.lost += 1;
    return;
  }
  const number = messages - waiting.length;
  const until = waiting.shift();
  if (binary !== isBinary(number) || String(data) !== content(number)) {
    counts.lost += 1;
  } else {
    counts.echoes += 1;
    for (; reported < until; reported += 1) console.log("answered");
  }
  fillWindow();
}

const lines = createInterface({ input: process.stdin });
lines.on("line", () => { asked += 1; });
lines.on("close", () => {
  ends = true;
  socket.send(END);
});

const socket = new WebSocket(url, { ca: readFileSync(roots) });
socket.on("open", fillWindow);
socket.on("message", receive);
socket.on("pong", (data) => {
  if (String(data) === String(counts.pongs)) counts.pongs += 1; else counts.lost += 1;
});
socket.on("error", (error) => console.error(error));
socket.on("close", (code, reason) => {
  if (!ends || code !== 1000) {
    console.error(`closed: ${code} ${reason}`);
    counts.closed += 1;
  }
  counts.lost += waiting.length + pings - counts.pongs;
  console.log(Object.values(counts).join(" "));
  process.exit();
});
