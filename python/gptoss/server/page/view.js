// What a message looks like: the user's words, an answer that grows while it streams, an error.

import { blocksOf, nodeOf } from "./markdown.js";

export function userNode(text) {
  const node = article("user", "You");
  const bubble = document.createElement("div");
  bubble.className = "bubble";
  bubble.textContent = text;
  node.append(bubble);
  return node;
}

/** An answer. Pieces are collected and drawn once a frame, and of the text only the blocks that changed. */
export class Answer {
  constructor(onDrawn) {
    this.reasoning = "";
    this.content = "";
    this.node = article("answer", "Answer");
    this.node.setAttribute("aria-busy", "true");
    this.onDrawn = onDrawn;
    this.frame = 0;
    this.blocks = []; // sources of what is drawn
    this.started = performance.now();
    this.first = 0; // when the first piece came
    this.answered = 0; // when the reasoning was over

    this.waiting = div("waiting", "Reading");
    this.details = document.createElement("details");
    this.details.className = "reasoning";
    this.details.hidden = true;
    this.summary = document.createElement("summary");
    this.thoughts = div("thoughts", "");
    this.details.append(this.summary, this.thoughts);
    this.text = div("text", "");
    this.foot = div("foot", "");
    this.foot.hidden = true;
    this.node.append(this.waiting, this.details, this.text, this.foot);
  }

  push({ reasoning = "", content = "" }) {
    const now = performance.now();
    this.first ||= now;
    this.reasoning += reasoning;
    this.content += content;
    if (content) this.answered ||= now;
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.waiting.hidden = Boolean(this.reasoning || this.content);
    this.drawReasoning();
    const blocks = blocksOf(this.content);
    const same = blocks.findIndex((block, index) => block.source !== this.blocks[index]);
    const keep = same < 0 ? blocks.length : same;
    while (this.text.childNodes.length > keep) this.text.lastChild.remove();
    this.text.append(...blocks.slice(keep).map(nodeOf));
    this.blocks = blocks.map((block) => block.source);
    this.onDrawn();
  }

  drawReasoning() {
    if (!this.reasoning) return;
    this.details.hidden = false;
    const thinking = !this.answered && this.node.ariaBusy === "true";
    this.details.classList.toggle("thinking", thinking);
    const seconds = ((this.answered || performance.now()) - this.first) / 1000;
    this.summary.textContent = thinking ? "Thinking" : `Thought for ${seconds < 9.5 ? seconds.toFixed(1) : seconds.toFixed(0)} s`;
    const drawn = this.thoughts.firstChild;
    if (!drawn) this.thoughts.textContent = this.reasoning;
    else if (drawn.length < this.reasoning.length) drawn.appendData(this.reasoning.slice(drawn.length));
  }

  /** The last state: what it came to, with the notes and buttons that go below it. */
  finish(notes, buttons) {
    this.answered ||= performance.now();
    this.node.setAttribute("aria-busy", "false");
    this.waiting.remove();
    this.foot.append(...buttons, ...notes.map((note) => span(note)));
    this.foot.hidden = false;
    this.draw();
  }
}

export function errorNode(message, buttons) {
  const node = div("error", "");
  node.setAttribute("role", "alert");
  const text = document.createElement("p");
  text.textContent = message;
  node.append(text, ...buttons);
  return node;
}

export function button(label, onClick) {
  const node = document.createElement("button");
  node.type = "button";
  node.className = "small";
  node.textContent = label;
  node.addEventListener("click", () => onClick(node));
  return node;
}

/** Copies, and says so for a moment. */
export async function copy(node, text) {
  const label = node.textContent;
  try {
    await navigator.clipboard.writeText(text);
    node.textContent = "Copied";
  } catch {
    node.textContent = "Not allowed";
  }
  setTimeout(() => (node.textContent = label), 1500);
}

function article(kind, label) {
  const node = document.createElement("article");
  node.className = kind;
  node.setAttribute("aria-label", label);
  return node;
}

function div(kind, text) {
  const node = document.createElement("div");
  node.className = kind;
  node.textContent = text;
  return node;
}

function span(text) {
  const node = document.createElement("span");
  node.textContent = text;
  return node;
}
