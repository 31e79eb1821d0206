// Elements are made here alone, and text always becomes a text node: nothing that a report holds is read as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes, listeners (on…) and children; strings become text nodes, null is left out. */
function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

/** Text of the report, which may be written in any direction, apart from the sentence around it. */
function given(text) {
  return element("bdi", { dir: "auto" }, String(text));
}

const SIGNIFICANT = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const SIGNED = new Intl.NumberFormat("en", { maximumSignificantDigits: 3, signDisplay: "exceptZero" });
const LOSS = new Intl.NumberFormat("en", { minimumFractionDigits: 3, maximumFractionDigits: 3 });
const LOSS_CHANGE = new Intl.NumberFormat("en", { minimumFractionDigits: 3, maximumFractionDigits: 3, signDisplay: "exceptZero" });
const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const SHARE = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });

/** A figure for readers; "–" where there is none. */
function figure(value, format = SIGNIFICANT) {
  return isNumber(value) ? format.format(value).replace("-", "−") : "–";
}

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

/** A table in a frame that scrolls by itself where the screen is narrow. Cells are strings or nodes; the first of a row names it. */
function table(caption, columns, rows) {
  const cell = (content, column) => (column === 0 ? element("th", { scope: "row" }, content) : element("td", {}, content));
  return element(
    "div",
    { class: "frame", tabindex: 0, role: "region", "aria-label": caption },
    element(
      "table",
      {},
      element("caption", { class: "unseen" }, caption),
      element("thead", {}, element("tr", {}, columns.map((column) => element("th", { scope: "col" }, column)))),
      element("tbody", {}, rows.map((row) => element("tr", {}, row.map(cell)))),
    ),
  );
}

/** A closed part of the page whose content is made when it is first opened. */
function onDemand(summary, make) {
  const details = element("details", {}, element("summary", {}, summary));
  details.addEventListener("toggle", () => details.childElementCount > 1 || details.append(make()));
  return details;
}

/** A choice with a label; `options` are [value, text] pairs. */
function choice(id, label, options, chosen, onchange) {
  const select = element(
    "select",
    { id, onchange: (event) => onchange(event.target.value) },
    options.map(([value, text]) => element("option", { value, selected: value === chosen }, text)),
  );
  return element("label", { class: "field" }, element("span", {}, label), select);
}

/** Lowest and highest number of a list, or null. */
function extent(values) {
  const numbers = values.filter(isNumber);
  return numbers.length ? [numbers.reduce((a, b) => Math.min(a, b)), numbers.reduce((a, b) => Math.max(a, b))] : null;
}

function unique(values) {
  return [...new Set(values)];
}

const BYTES = /^(\\x[0-9a-f]{2})+$/;
const UNSEEN = /[\s\p{Cc}\p{Cf}\p{Co}\p{Cs}]/u;
const JOINS = /[\u200c\u200d\u{e0020}-\u{e007f}]/u; // between letters and in emoji they are part of what is seen
const MARKS = { " ": "·", "\n": "↵", "\t": "⇥", "\u00a0": "⍽" };

/** Nodes for a token's text: what cannot be seen carries a mark, which is drawn by the style and not copied. */
function tokenText(text) {
  if (text.length > 1 && !UNSEEN.test(text)) return [text];
  const nodes = [];
  let plain = "";
  for (const character of text) {
    if (!UNSEEN.test(character) || (JOINS.test(character) && text !== character)) {
      plain += character;
      continue;
    }
    nodes.push(plain, unseen(character));
    plain = "";
  }
  return [...nodes, plain].filter((node) => node !== "");
}

function unseen(character) {
  const code = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
  const kind = character === " " ? "space" : character === "\n" ? "newline" : "control";
  return element("span", { class: kind, "data-mark": MARKS[character] ?? `U+${code}` }, character);
}

/** A token by itself, as tables and sentences show it. */
function loneToken(text) {
  const shown = text === "" ? [element("i", {}, "empty")] : tokenText(text);
  return element("bdi", { class: BYTES.test(text) ? "lone bytes" : "lone", dir: BYTES.test(text) ? "ltr" : "auto" }, shown);
}
