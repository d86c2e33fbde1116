// Clients for Node or a browser, which run while the service is restarted and reloaded. The test appends a call of one
// of these functions.

const SERVICE = "127.0.0.1:8080";
const TLS = "https://127.0.0.1:8443";
const TEST = "http://127.0.0.1:9000";

// Sends a report to the test, and waits for the response.
async function report(what) {
  const answer = await fetch(TEST, { method: "POST", body: JSON.stringify(what) });
  return answer.text();
}

async function byFetch(path, body, origin = `http://${SERVICE}`) {
  const method = body === undefined ? "GET" : "POST";
  const answer = await fetch(`${origin}${path}`, { method, body, cache: "no-store" });
  return [answer.status, await answer.text()];
}

// Only for Node.
function byAgent() {
  const http = require("node:http");
  const agent = new http.Agent({ keepAlive: true });
  return (path, body) => new Promise((resolve, reject) => {
    const method = body === undefined ? "GET" : "POST";
    const request = http.request(`http://${SERVICE}${path}`, { agent, method }, (answer) => {
      let text = "";
      answer.setEncoding("utf8");
      answer.on("data", (piece) => { text += piece; });
      answer.on("error", reject);
      answer.on("end", () => resolve([answer.statusCode, text]));
    });
    request.on("error", reject);
    request.end(body);
  });
}

// A function that sends one request, never twice, and counts whether the right response arrives.
const counting = (counts, ask) => async (path, body, isRight) => {
  try {
    const [status, text] = await ask(path, body);
    if (status !== 200 || !isRight(text)) throw new Error(`${path}: ${status} ${text}`);
    counts.answered += 1;
  } catch (error) {
    counts.lost.push(`${error} ${error.cause ?? ""}`);
  }
};

// A request that ends at once, and one with a body; a pause after each, because Node releases a connection only after it
// has delivered the end of the response. The next request, if sent at once, would open another connection.
async function twoRequests(one) {
  const body = "x".repeat(1024);
  const pause = () => new Promise((resolve) => { setTimeout(resolve, 20); });
  await one("/", undefined, (text) => text.startsWith("pid "));
  await pause();
  await one("/echo", body, (text) => text === body);
  await pause();
}

// Sends requests on `clients` connections until the test answers the second report.
async function requests(clients, ask) {
  const counts = { answered: 0, lost: [] };
  const one = counting(counts, ask);
  const all = (work) => Promise.all(Array.from({ length: clients }, work));
  do {
    // At the same time, so that each request needs its own connection.
    await all(() => one("/sleep?duration=300ms", undefined, (text) => text === "slept 300ms\n"));
  } while (await report("connected") === "again");
  let isOver = false;
  const running = all(async () => { while (!isOver) await twoRequests(one); });
  await report("asking");
  isOver = true;
  await running;
  await report(counts);
}

// An event stream. Reports the counts after each event, and at the end of the connection, with what `more` returns.
function events(origin = `http://${SERVICE}`, more = () => ({})) {
  const counts = { opened: 0, ended: 0, events: 0, missed_or_repeated: 0 };
  let reports = Promise.resolve();
  const reportInOrder = () => {
    const now = { ...counts, ...more() };
    reports = reports.then(() => report(now));
  };
  const source = new EventSource(`${origin}/events`);
  source.onopen = () => { counts.opened += 1; };
  source.onerror = () => {
    counts.ended += 1;
    reportInOrder();
  };
  source.onmessage = (event) => {
    if (event.lastEventId !== String(counts.events)) counts.missed_or_repeated += 1;
    counts.events += 1;
    reportInOrder();
  };
}

// An event stream over TLS, and `clients` other requests at a time. All of them begin at once on a new connection, so that
// the browser may send some of them before it has the settings of the server, and encode them with its header table.
async function eventsBesideRequests(clients) {
  const requests = { answered: 0, lost: [] };
  const one = counting(requests, (path, body) => byFetch(path, body, TLS));
  twoRequests(one);
  events(TLS, () => ({ requests: { ...requests } }));
  for (let client = 0; client < clients; client += 1) {
    (async () => { for (;;) await twoRequests(one); })();
  }
}

// A WebSocket. Reports each echo, after which it sends the next message, and the end of the connection.
function webSocket() {
  const counts = { opened: 0, echoed: 0, wrong: 0, errors: 0, closed: [] };
  const socket = new WebSocket(`ws://${SERVICE}/socket`);
  const text = () => `message ${counts.echoed}`;
  socket.onopen = () => {
    counts.opened += 1;
    socket.send(text());
  };
  socket.onmessage = async (event) => {
    if (event.data === text()) counts.echoed += 1; else counts.wrong += 1;
    await report(counts);
    socket.send(text());
  };
  socket.onerror = () => { counts.errors += 1; };
  socket.onclose = (event) => {
    counts.closed.push(`${event.code} ${event.reason}${event.wasClean ? "" : ", not clean"}`);
    report(counts);
  };
}
