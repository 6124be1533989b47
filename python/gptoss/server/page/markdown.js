// Markdown as models write it, to DOM nodes. Text only ever becomes text nodes and a fixed set of elements: there is no HTML string
// on the way, so what a model writes cannot become markup.

const DEEPEST = 8; // quotes and lists in each other; deeper ones stay text

/** Splits text into blocks: {kind, source, ...}. `source` says whether a block has changed while text streams in. */
export function blocksOf(text, depth = 0) {
  if (depth > DEEPEST) return [{ kind: "text", text, source: text }];
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, next] = blockAt(lines, at);
    block.depth = depth;
    block.source = lines.slice(at, next).join("\n");
    blocks.push(block);
    at = next;
  }
  return blocks;
}

/** A new element for a block. */
export function nodeOf(block) {
  switch (block.kind) {
    case "code":
      return codeNode(block);
    case "heading":
      return element(`h${Math.min(block.level + 2, 6)}`, inline(block.text));
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", blocksOf(block.text, block.depth + 1).map(nodeOf));
    case "list":
      return listNode(block);
    case "table":
      return tableNode(block);
    default:
      return element("p", inline(block.text));
  }
}

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(\S.*)$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const ITEM = /^(\s*)([-*+•]|\d{1,9}[.)])\s+(.*)$/;

/** [the block that starts at line `at`, the line behind it] */
function blockAt(lines, at) {
  const line = lines[at];
  const fence = line.match(FENCE);
  if (fence) return codeAt(lines, at, fence);
  const heading = line.match(HEADING);
  if (heading) return [{ kind: "heading", level: heading[1].length, text: heading[2] }, at + 1];
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  if (QUOTE.test(line)) {
    let end = at;
    while (end < lines.length && QUOTE.test(lines[end])) end += 1;
    return [{ kind: "quote", text: lines.slice(at, end).map((quoted) => quoted.match(QUOTE)[1]).join("\n") }, end];
  }
  if (ITEM.test(line)) return listAt(lines, at);
  if (isTable(lines, at)) return tableAt(lines, at);

  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !startsBlock(lines, end)) end += 1;
  return [{ kind: "text", text: lines.slice(at, end).join("\n") }, end];
}

function startsBlock(lines, at) {
  const line = lines[at];
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line)) || isTable(lines, at);
}

/** A fence that is never closed holds the rest: that is how code looks while it streams. */
function codeAt(lines, at, fence) {
  const closing = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  return [{ kind: "code", language: fence[2].trim().split(" ")[0], text: lines.slice(at + 1, end).join("\n") }, Math.min(end + 1, lines.length)];
}

/** A list with what is indented below each item, lists in it too. */
function listAt(lines, at) {
  const [, indent, marker] = lines[at].match(ITEM);
  const ordered = /\d/.test(marker);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const depth = indentOf(lines[end]);
    if (sameList(lines[end], indent, ordered)) {
      items.push([lines[end].match(ITEM)[3]]);
    } else if (!lines[end].trim()) {
      let next = end;
      while (next < lines.length && !lines[next].trim()) next += 1;
      if (next === lines.length || !(indentOf(lines[next]) > indent.length + 1 || sameList(lines[next], indent, ordered))) break;
      items.at(-1).push("");
      end = next;
      continue;
    } else if (depth > indent.length + 1 || !startsBlock(lines, end)) {
      items.at(-1).push(lines[end].slice(Math.min(depth, indent.length + (ordered ? 3 : 2))));
    } else {
      break;
    }
    end += 1;
  }
  const start = ordered ? Number.parseInt(marker, 10) : 1;
  return [{ kind: "list", ordered, start, items: items.map((item) => item.join("\n")) }, end];
}

function indentOf(line) {
  return line.length - line.trimStart().length;
}

function sameList(line, indent, ordered) {
  const item = line.match(ITEM);
  return item !== null && item[1].length >= indent.length && item[1].length <= indent.length + 1 && /\d/.test(item[2]) === ordered;
}

function isTable(lines, at) {
  if (!lines[at].includes("|") || !lines[at + 1]?.includes("|")) return false;
  return cells(lines[at + 1]).every((cell) => /^:?-+:?$/.test(cell));
}

function tableAt(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const align = cells(lines[at + 1]).map((rule) => (rule.endsWith(":") ? (rule.startsWith(":") ? "center" : "right") : "left"));
  return [{ kind: "table", align, head: cells(lines[at]), rows: lines.slice(at + 2, end).map(cells) }, end];
}

function cells(line) {
  const row = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return row.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function codeNode({ language, text }) {
  const code = element("code", [text]);
  const head = element("div", [element("span", [language || "text"])]);
  head.className = "code-head";
  if (navigator.clipboard) {
    const copy = element("button", ["Copy"]);
    copy.type = "button";
    copy.className = "copy-code";
    head.append(copy);
  }
  const pre = element("pre", [code]);
  pre.tabIndex = 0; // long lines scroll by keyboard, too
  const block = element("div", [head, pre]);
  block.className = "code";
  return block;
}

function listNode({ ordered, start, items, depth }) {
  const list = element(ordered ? "ol" : "ul", items.map((item) => element("li", itemNodes(item, depth + 1))));
  if (ordered && start !== 1) list.start = start;
  return list;
}

/** A plain item stays a line; only more than one paragraph makes paragraphs. */
function itemNodes(item, depth) {
  return blocksOf(item, depth).flatMap((block, index) => (index === 0 && block.kind === "text" ? inline(block.text) : [nodeOf(block)]));
}

function tableNode({ align, head, rows }) {
  const row = (kind, texts) =>
    element("tr", head.map((_, column) => {
      const cell = element(kind, inline(texts[column] ?? ""));
      cell.className = align[column] ?? "left";
      return cell;
    }));
  const table = element("table", [element("thead", [row("th", head)]), element("tbody", rows.map((texts) => row("td", texts)))]);
  const frame = element("div", [table]);
  frame.className = "table";
  frame.tabIndex = 0;
  return frame;
}

// In order of precedence; each group of names is one alternative of the pattern.
const INLINE = new RegExp(
  [
    /(?<!`)(?<ticks>`+)(?!`)(?<code>[^]{0,4000}?[^`])\k<ticks>(?!`)/,
    /\\(?<escaped>[\\`*_{}[\]()#+\-.!|~>])/,
    /\[(?<label>[^\][\n]{1,500})\]\((?<link>[^\s()]{1,2000}(?:\([^\s()]{0,200}\))?)(?:\s+"[^"\n]{0,200}")?\)/,
    /(?<url>https?:\/\/[^\s<>()[\]"'`*]{1,2000}[^\s<>()[\]"'`*.,;:!?])/,
    /\*\*(?=\S)(?<bold>(?:[^*\n]|\*(?!\*)|\n(?!\n)){1,2000}?\S?)\*\*/,
    /~~(?=\S)(?<struck>[^~\n]{1,500})~~/,
    /(?<![\p{L}\p{N}*])\*(?=[^\s*])(?<star>[^*\n]{1,500}?)(?<!\s)\*(?![\p{L}\p{N}*])/,
    /(?<![\p{L}\p{N}_])_(?=[^\s_])(?<line>[^_\n]{1,500}?)(?<!\s)_(?![\p{L}\p{N}_])/,
    /(?<hard> {2,}\n|<br\s*\/?>)/,
  ].map((pattern) => pattern.source).join("|"),
  "gu",
);

/** Nodes of a line or paragraph. */
function inline(text) {
  const nodes = [];
  let done = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > done) nodes.push(text.slice(done, match.index));
    done = match.index + match[0].length;
    nodes.push(inlineNode(match[0], match.groups));
  }
  if (done < text.length) nodes.push(text.slice(done));
  return nodes;
}

function inlineNode(whole, group) {
  if (group.code !== undefined) return element("code", [group.code.replace(/^ (.*\S.*) $/s, "$1").replaceAll("\n", " ")]);
  if (group.escaped !== undefined) return group.escaped;
  if (group.link !== undefined) return linkNode(whole, group.link, inline(group.label));
  if (group.url !== undefined) return linkNode(whole, group.url, [group.url]);
  if (group.bold !== undefined) return element("strong", inline(group.bold));
  if (group.struck !== undefined) return element("s", inline(group.struck));
  if (group.star !== undefined) return element("em", inline(group.star));
  if (group.line !== undefined) return element("em", inline(group.line));
  return element("br");
}

/** A link to the web or a mail address; anything else, javascript: above all, stays the text it is. */
function linkNode(whole, target, children) {
  if (!/^(https?:\/\/|mailto:)/i.test(target)) return whole;
  const link = element("a", children);
  link.href = target;
  link.target = "_blank";
  link.rel = "noopener noreferrer nofollow";
  return link;
}

function element(name, children = []) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}
