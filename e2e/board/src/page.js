// Shows the newest notes, and writes notes. The connections stay open when the service is restarted or reloaded; the page
// connects again only after a failure.
const SHOWN = 100;
const form = document.forms[0];
const list = document.getElementById("notes");

new EventSource("events").onmessage = ({ data }) => {
  const { id, author, text } = JSON.parse(data);
  const item = document.createElement("li");
  item.value = id;
  item.append(`${author}: ${text}`); // as text, so that a note cannot contain elements
  list.prepend(item);
  if (list.children.length > SHOWN) list.lastChild.remove();
};

// The WebSocket of the author; its first message is the name.
let socket;
form.onsubmit = (event) => {
  event.preventDefault();
  const { author, note, refusal } = form.elements;
  const write = () => socket.send(note.value);
  if (socket?.readyState === WebSocket.OPEN) return write();
  socket = new WebSocket(new URL("socket", location.href.replace(/^http/, "ws")));
  socket.onopen = () => { socket.send(author.value); write(); };
  socket.onmessage = ({ data }) => {
    const answer = JSON.parse(data);
    refusal.value = answer.error ?? "";
    if (answer.name !== undefined) author.disabled = true;
    if (answer.note !== undefined) note.value = "";
  };
  socket.onclose = () => { author.disabled = false; refusal.value = "The connection has ended: write again."; };
};
