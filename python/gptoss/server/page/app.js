// The chat: what was said, and what happens when. The server keeps nothing: every question sends the whole conversation.

import { chat, modelName } from "./api.js";
import { remember, remembered, themeButton } from "./settings.js";
import { Answer, button, copy, errorNode, userNode } from "./view.js";

const $ = (id) => document.getElementById(id);
const NEAR = 60; // pixels from the end that still count as reading along

let messages = []; // {role, content}; a new chat is a new list, so that an old answer cannot end up in it
let running = null; // AbortController of the answer that streams
let reading = true; // whether the reader follows the end of the text

async function connect() {
  try {
    $("model").textContent = await modelName($("key").value);
  } catch (error) {
    $("model").textContent = "";
    if (error.status === 401) askForKey();
    else fail(error, connect);
  }
}

function send() {
  const text = $("message").value.trim();
  if (!text || running) return;
  $("message").value = "";
  fitMessage();
  $("log").querySelector(".error")?.remove();
  messages.push({ role: "user", content: text });
  $("log").append(userNode(text));
  reading = true;
  answer();
}

/** Asks for the next answer to the conversation as it stands. */
async function answer() {
  const conversation = messages;
  const view = new Answer(followEnd);
  const notes = [];
  running = new AbortController();
  const { signal } = running;
  $("log").append(view.node);
  showState("Answering");
  view.draw();
  try {
    let usage;
    if (!$("model").textContent) $("model").textContent = await modelName($("key").value);
    for await (const piece of chat(question(conversation), $("key").value, signal)) {
      if (piece.reasoning || piece.content) view.push(piece);
      if (piece.finish === "length") notes.push("cut off at the length limit");
      usage = piece.usage ?? usage;
    }
    notes.unshift(...speed(view, usage));
    finish(view, conversation, notes, "Answer finished");
  } catch (error) {
    if (signal.aborted) {
      finish(view, conversation, ["stopped"], "Stopped");
      return;
    }
    if (view.first) finish(view, conversation, ["incomplete"], "");
    else view.node.remove();
    running = null;
    showState("");
    if (error.status === 401) askForKey();
    if (error.status === 404) $("model").textContent = ""; // another model has taken its place: ask for its name
    fail(error, () => again(view, conversation));
  }
}

function question(conversation) {
  const system = $("system").value.trim();
  return {
    model: $("model").textContent,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
    reasoning_effort: $("effort").value,
  };
}

function finish(view, conversation, notes, state) {
  if (conversation !== messages) return; // a new chat has begun
  running = null;
  if (view.content) conversation.push({ role: "assistant", content: view.content });
  for (const old of $("log").querySelectorAll(".again")) old.remove();
  const retry = button("Again", () => again(view, conversation));
  retry.classList.add("again");
  retry.title = "Answer this once more";
  const buttons = navigator.clipboard && view.content ? [button("Copy", (node) => copy(node, view.content))] : [];
  view.finish(notes, [...buttons, retry]);
  showState(state);
}

/** Takes back the last answer and asks anew. */
function again(view, conversation) {
  if (running || conversation !== messages) return;
  if (conversation.at(-1)?.role === "assistant") conversation.pop();
  view.node.remove();
  $("log").querySelector(".error")?.remove();
  reading = true;
  answer();
}

function speed(view, usage) {
  const seconds = (performance.now() - view.first) / 1000;
  const tokens = usage?.completion_tokens;
  if (!tokens) return [];
  const rate = tokens > 1 && seconds > 0 ? [`${((tokens - 1) / seconds).toFixed(1)} tokens/s`] : [];
  return [`${tokens} tokens`, ...rate];
}

function fail(error, retry) {
  $("log").querySelector(".error")?.remove();
  const node = errorNode(error.message, [
    button("Try again", () => {
      node.remove();
      retry();
    }),
  ]);
  $("log").append(node);
  showState("");
  followEnd();
}

function newChat() {
  running?.abort();
  running = null;
  messages = [];
  $("log").replaceChildren();
  showState("New chat");
  $("message").focus();
}

function askForKey() {
  openSettings();
  $("key").focus();
  $("key-note").textContent = "This server asks for an API key. It is forgotten when this tab closes.";
}

function openSettings() {
  if (!$("settings").open) $("settings").showModal();
}

/** Buttons and what a screen reader says, for the state the chat is in. */
function showState(text) {
  const busy = running !== null;
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("send").disabled = !$("message").value.trim();
  $("welcome").hidden = $("log").childElementCount > 0;
  $("new-chat").disabled = $("log").childElementCount === 0;
  $("status").textContent = text;
}

function fitMessage() {
  const field = $("message");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
  $("send").disabled = !field.value.trim();
}

function followEnd() {
  const scroller = $("scroller");
  if (reading) scroller.scrollTop = scroller.scrollHeight;
  $("to-end").hidden = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
}

function keepSetting(name, event) {
  $(name).value = remembered(name) || $(name).value;
  $(name).addEventListener(event, () => remember(name, $(name).value));
}

keepSetting("effort", "change");
keepSetting("system", "input");
keepSetting("key", "input");
themeButton($("theme"));

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
$("message").addEventListener("input", fitMessage);
$("stop").addEventListener("click", () => running?.abort());
$("new-chat").addEventListener("click", newChat);
$("open-settings").addEventListener("click", openSettings);
$("settings").addEventListener("close", () => {
  if (!$("model").textContent) connect();
  $("message").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("settings").open) running?.abort();
});
$("scroller").addEventListener("scroll", () => {
  const scroller = $("scroller");
  reading = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
  $("to-end").hidden = reading;
}, { passive: true });
$("to-end").addEventListener("click", () => {
  reading = true;
  followEnd();
});
$("examples").addEventListener("click", (event) => {
  if (event.target.tagName !== "BUTTON") return;
  $("message").value = event.target.textContent;
  fitMessage();
  $("message").focus();
});
$("log").addEventListener("click", (event) => {
  if (!event.target.classList.contains("copy-code")) return;
  copy(event.target, event.target.closest(".code").querySelector("code").textContent);
});

showState("");
fitMessage();
$("message").focus();
connect();
