// Kinds of tokens: groups of them, and a table of each that its headings sort.

const TYPE_COLUMNS = [
  ["text", "Token", null],
  ["count", "Count", WHOLE],
  ["dropped", "Dropped", WHOLE],
  ["dropped_share", "Share dropped", SHARE],
  ["loss", "Mean loss", LOSS],
  ["history_loss", "History", LOSS],
  ["change", "Change", LOSS_CHANGE],
];
const FEW = 15;
const LEAST = [1, 5, 20, 100];
const USUAL_LEAST = 20; // below it a share is chance; the sentence at the top names no kind that is rarer either

function showTypes(place, report) {
  if (report.types.length === 0) {
    place.append(element("p", { class: "muted" }, "No response tokens were recorded."));
    return;
  }
  const types = report.types.map((type) => {
    const share = 1 - type.selected_share;
    return { ...type, dropped_share: share, dropped: Math.round(type.count * share) };
  });
  const reaching = (least) => types.filter((type) => type.count >= least);
  const fitting = LEAST.filter((least) => reaching(least).length > 0);
  const least = Math.min(USUAL_LEAST, fitting.at(-1));
  const state = { by: "dropped", isRising: false, isWhole: false, least };
  const body = element("tbody");
  const headings = TYPE_COLUMNS.map(([name, title]) =>
    element("th", { scope: "col" }, element("button", { type: "button", onclick: () => sortBy(name) }, title)),
  );
  const more = element("button", { type: "button", class: "plain", onclick: () => show((state.isWhole = !state.isWhole)) });
  const caption = "Kinds of tokens: how often they are dropped, and their mean losses";

  function sortBy(name) {
    state.isRising = state.by === name ? !state.isRising : name === "text";
    state.by = name;
    show();
  }
  function show() {
    const sorted = sortedTypes(reaching(state.least), state);
    body.replaceChildren(...(state.isWhole ? sorted : sorted.slice(0, FEW)).map(typeRow));
    TYPE_COLUMNS.forEach(([name], index) =>
      headings[index].setAttribute("aria-sort", name !== state.by ? "none" : state.isRising ? "ascending" : "descending"),
    );
    more.textContent = state.isWhole ? `Show ${FEW}` : `Show all ${sorted.length}`;
    more.hidden = sorted.length <= FEW;
  }
  function setLeast(value) {
    state.least = Number(value);
    show();
  }
  show();
  const options = fitting.map((number) => [String(number), number === 1 ? "all" : `${number} times or more`]);
  if (report.groups.length) place.append(groupsTable(report.groups));
  if (fitting.length > 1) {
    place.append(element("div", { class: "controls" }, choice("least", "Tokens that occur", options, String(state.least), setLeast)));
  }
  place.append(
    element("div", { class: "frame", tabindex: 0, role: "region", "aria-label": caption },
      element("table", { class: "types" },
        element("caption", { class: "unseen" }, caption), element("thead", {}, element("tr", {}, headings)), body)),
    more,
  );
}

function groupsTable(groups) {
  const columns = ["Group", "Count", "Of all tokens", "Dropped", "Share dropped", "Mean loss"];
  const rows = groups.map((group) => [
    given(group.name), figure(group.count, WHOLE), figure(group.share, SHARE), figure(group.dropped, WHOLE),
    figure(group.dropped_share, SHARE), figure(group.loss, LOSS),
  ]);
  const sum = (name) => groups.reduce((total, group) => total + group[name], 0);
  const [count, dropped] = [sum("count"), sum("dropped")];
  const loss = groups.reduce((total, group) => total + group.loss * group.count, 0) / count;
  rows.push(["all", figure(count, WHOLE), figure(1, SHARE), figure(dropped, WHOLE), figure(dropped / count, SHARE), figure(loss, LOSS)]);
  const made = table("Groups of tokens: how many, and how many are dropped", columns, rows);
  made.classList.add("groups");
  return made;
}

/** Rows without a value come last in either direction. */
function sortedTypes(types, { by, isRising }) {
  const sign = isRising ? 1 : -1;
  const compare = (a, b) => (typeof a === "string" ? (a < b ? -1 : a > b ? 1 : 0) : a - b);
  return [...types].sort((one, other) => {
    const [a, b] = [one[by], other[by]];
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * compare(a, b) || other.count - one.count;
  });
}

function typeRow(type) {
  return element(
    "tr",
    {},
    TYPE_COLUMNS.map(([name, , format]) => {
      if (name === "text") return element("th", { scope: "row" }, loneToken(type.text), element("span", { class: "id" }, type.id));
      if (name === "dropped_share") return element("td", {}, share(type[name]));
      const isSame = name === "change" && isNumber(type[name]) && Math.abs(type[name]) < 0.0005;
      return element("td", {}, isSame ? "no change" : figure(type[name], format));
    }),
  );
}

function share(value) {
  const bar = element("span", { class: "share", "aria-hidden": "true" }, element("span"));
  bar.firstChild.style.inlineSize = `${100 * (value ?? 0)}%`;
  return [bar, element("span", { class: "percent" }, figure(value, SHARE))];
}
