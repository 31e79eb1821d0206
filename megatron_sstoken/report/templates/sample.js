// One sample: its tokens, how they are marked, and the figures of one of them.

const METRICS = [
  ["score", "Score"],
  ["loss", "Loss"],
  ["history_loss", "History loss"],
  ["rel", "REL"],
  ["attention", "Attention"],
  ["entropy", "Entropy"],
];
const NATS = ["loss", "history_loss", "rel", "entropy"]; // most are small and few are large: shaded by their root
const SHADES = 8;
const [LEAST_OPENING, MOST_OPENING] = [8, 512];
const BIDI = /[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/;
const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/;

/**
 * What samples begin with alike, such as a system prompt: sample → [number of tokens, key]. An opening ends with a line and is
 * context; a fifth of the samples have it. Of several the longest counts; those of a few tokens are not worth leaving out.
 */
function openingsOf(samples) {
  const found = new Map();
  const counts = new Map();
  for (const sample of samples) {
    const { id, role, text } = sample.tokens;
    const end = sample.first_position === 0 ? role.findIndex(Boolean) : 0;
    const lengths = text.slice(0, MOST_OPENING).flatMap((one, index) => (index < end && one.includes("\n") ? [index + 1] : []));
    found.set(sample, lengths.filter((length) => length >= LEAST_OPENING).map((length) => [length, id.slice(0, length).join()]));
    for (const [, key] of found.get(sample)) counts.set(key, (counts.get(key) ?? 0) + 1);
  }
  const least = Math.max(2, samples.length / 5);
  return new Map([...found].map(([sample, openings]) => [sample, openings.filter(([, key]) => counts.get(key) >= least).at(-1)]));
}

/** What a sample's records say at a step: of the newest record until then, or else of its first; and the one before. */
function recordsAt(sample, step) {
  const recorded = Object.keys(sample.at).map(Number).sort((a, b) => a - b);
  const now = recorded.filter((one) => one <= step).at(-1) ?? recorded[0];
  const before = recorded.filter((one) => one < now).at(-1);
  return { now, values: sample.at[now], before, valuesBefore: sample.at[before] ?? null };
}

/** `opening`: how many of its first tokens are left out until they are asked for, and the sample that shows them; or null. */
function makeSample(sample, opening) {
  const tokens = sample.tokens.text.map((text, index) => makeToken(text, index));
  const hidden = opening ? hiddenOpening(tokens.slice(0, opening.length), opening) : null;
  const facts = element("p", { class: "facts" });
  const node = element(
    "article",
    { class: "sample", "data-sample": sample.sample },
    element("header", {}, element("h3", {}, `Sample ${sample.sample}`), facts),
    element("div", { class: "tokens", role: "group", "aria-label": `Tokens of sample ${sample.sample}; arrow keys move` },
      hidden ? [hidden.button, hidden.node, tokens.slice(opening.length)] : tokens),
    sample.is_cut ? element("p", { class: "muted small" }, "Cut: the sample has more tokens than are shown.") : null,
  );
  const first = sample.tokens.role.indexOf(1);
  if (tokens.length) tokens[Math.max(0, first)].tabIndex = 0;
  // Of tokens left out none can be reached.
  const firstShown = () => (hidden?.isOpen() === false ? opening.length : 0);
  return { sample, node, tokens, facts, firstShown, open: () => hidden?.open() };
}

function hiddenOpening(tokens, { length, shownIn }) {
  const node = element("span", { hidden: true }, tokens);
  const button = element("button", { type: "button", class: "opening", onclick: () => open() }, `${length} tokens as in sample ${shownIn}`);
  function open() {
    node.hidden = false;
    button.hidden = true;
  }
  return { node, button, open, isOpen: () => !node.hidden };
}

/** Marks of writing direction work inside their own token alone; bytes are written from the left. */
function makeToken(text, index) {
  const isBytes = BYTES.test(text);
  return element(
    BIDI.test(text) ? "bdi" : "span",
    { "data-index": index, tabindex: -1, dir: isBytes ? "ltr" : null },
    text === "" ? element("span", { class: "control", "data-mark": "∅" }) : tokenText(text),
  );
}

/** Brings classes and facts of a sample up to date with the view. */
function paintSample({ sample, tokens, facts, firstShown, open }, view) {
  const records = recordsAt(sample, view.step);
  const { values, valuesBefore } = records;
  const hits = hitsOf(sample.tokens.text, view.search);
  if (Math.min(...hits) < firstShown()) open();
  const shade = values[view.metric];
  tokens.forEach((node, index) => {
    const classes = ["token"];
    if (BYTES.test(sample.tokens.text[index])) classes.push("bytes");
    if (hits.has(index)) classes.push("hit");
    const isDropped = isChosenFrom(sample, values, index) && !values.selected[index];
    if (!isChosenFrom(sample, values, index)) classes.push("context");
    else {
      classes.push(isDropped ? "dropped" : "kept", shadeOf(shade?.[index], view.scale));
      const flipped = valuesBefore !== null && valuesBefore.selected[index] !== values.selected[index];
      if (flipped) classes.push("flipped");
    }
    node.className = classes.join(" ");
    if (isDropped) node.setAttribute("role", "deletion");
    else node.removeAttribute("role");
  });
  facts.replaceChildren(...factsOf(sample, records, view.step));
}

/** Whether a token was one to choose: a response token with a loss. */
function isChosenFrom(sample, values, index) {
  return Boolean(sample.tokens.role[index]) && isNumber(values.loss[index]);
}

/** The class of a value's shade on a scale {low, high, power}, where values below zero have a tone of their own. */
function shadeOf(value, scale) {
  if (!isNumber(value) || scale === null) return "shade-0";
  const { low, high, power } = scale;
  const isBelow = low < 0 && value < 0;
  const share = low < 0 ? Math.abs(value) / Math.max(-low, high) : (value - low) / (high - low || 1);
  return `shade-${Math.round(Math.min(1, Math.max(0, share)) ** power * SHADES)}${isBelow ? " below" : ""}`;
}

/** Numbers of the tokens that hold a part of the text searched for. */
function hitsOf(texts, search) {
  const hits = new Set();
  if (search === "") return hits;
  const lowered = texts.map((text) => text.toLowerCase());
  const whole = lowered.join("");
  const ends = [];
  lowered.reduce((end, text, index) => (ends[index] = end + text.length), 0);
  for (let at = whole.indexOf(search); at >= 0; at = whole.indexOf(search, at + search.length)) {
    let index = ends.findIndex((end) => end > at);
    do hits.add(index);
    while (ends[index++] < at + search.length);
  }
  return hits;
}

/** Figures of the tokens that are shown, by the records of a step; null where undefined. */
function figuresOfShown(sample, values) {
  const chosenFrom = sample.tokens.role.map((_, index) => index).filter((index) => isChosenFrom(sample, values, index));
  const dropped = chosenFrom.filter((index) => !values.selected[index]);
  const changes = dropped
    .filter((index) => isNumber(values.history_loss?.[index]))
    .map((index) => values.loss[index] - values.history_loss[index]);
  return {
    chosenFrom,
    dropped,
    dropped_share: chosenFrom.length ? dropped.length / chosenFrom.length : null,
    drift: changes.length ? changes.reduce((a, b) => a + b, 0) / changes.length : null,
    top_score: extent(chosenFrom.map((index) => values.score?.[index]))?.[1] ?? null,
  };
}

/** In words: of the tokens that are shown, at the step that is shown. */
function factsOf(sample, { now, values }, step) {
  const { chosenFrom, dropped, dropped_share: part, drift: mean } = figuresOfShown(sample, values);
  const count = `${dropped.length} of ${chosenFrom.length} response tokens${sample.is_cut ? " shown" : ""} dropped`;
  const share = chosenFrom.length ? `${count} (${figure(part, SHARE)})` : "no response tokens";
  const drift = mean === null ? null : `their loss ${figure(mean, SIGNED)} nats against the history`;
  const parts = [share, drift, sample.source === null ? null : ["source ", given(sample.source)], recordText(sample, now, step)];
  return parts.filter((part) => part !== null).flatMap((part, index) => (index ? [" · ", part] : [part])).flat();
}

/** Which record is shown, where it is not the one of the step that was asked for or is the only one. */
function recordText(sample, now, step) {
  if (Object.keys(sample.at).length === 1) return `recorded at step ${figure(now)} alone`;
  if (now > step) return `step ${figure(now)}, its first record`;
  return now < step ? `step ${figure(now)}, its last record until ${figure(step)}` : `step ${figure(now)}`;
}

/** Name and figure of all that is known of a token. */
function figuresOf(sample, index, step) {
  const { now, values } = recordsAt(sample, step);
  const of = (name) => values[name]?.[index] ?? null;
  const isIn = isChosenFrom(sample, values, index);
  return [
    ["State", isIn ? (of("selected") ? "kept" : "dropped") : sample.tokens.role[index] ? "not scored" : "context"],
    ["Score", figure(of("score"))],
    ["Loss", figure(of("loss"))],
    ["History loss", figure(of("history_loss"))],
    ["REL", figure(of("rel"), SIGNED)],
    ["Attention", figure(of("attention"))],
    ...[["Entropy", "entropy"], ["Weight", "weight"]].filter(([, name]) => values[name]).map(([title, name]) => [title, figure(of(name))]),
    ["Token id", String(sample.tokens.id[index])],
    ["Position", String((sample.first_position ?? 0) + index)],
    ["Sample", String(sample.sample)],
    ["Step", figure(now)],
  ];
}

/** The token that an arrow key leads to, from the `first` that can be reached; null for other keys. */
function tokenAfter(key, tokens, index, first) {
  const last = tokens.length - 1;
  const within = (number) => Math.min(last, Math.max(first, number));
  const forward = RIGHT_TO_LEFT.test(tokens[index].textContent) ? -1 : 1;
  switch (key) {
    case "ArrowRight": return within(index + forward);
    case "ArrowLeft": return within(index - forward);
    case "ArrowDown": return onNextLine(tokens, index, 1, first);
    case "ArrowUp": return onNextLine(tokens, index, -1, first);
    case "Home": return first;
    case "End": return last;
    default: return null;
  }
}

function onNextLine(tokens, index, direction, first) {
  const boxOf = (number) => tokens[number].getClientRects()[0] ?? tokens[number].getBoundingClientRect();
  const start = boxOf(index);
  let [best, distance, line] = [index, Infinity, null];
  for (let number = index + direction; number >= first && number < tokens.length; number += direction) {
    const box = boxOf(number);
    if (Math.abs(box.top - start.top) < start.height / 2) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > start.height / 2) break;
    if (Math.abs(box.left - start.left) < distance) [best, distance] = [number, Math.abs(box.left - start.left)];
  }
  return best;
}
