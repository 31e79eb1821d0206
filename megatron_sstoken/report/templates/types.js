// Kinds of tokens: a table that its headings sort.

const TYPE_COLUMNS = [
  ["text", "Token", null],
  ["count", "Count", WHOLE],
  ["dropped", "Dropped", WHOLE],
  ["selected_share", "Kept", SHARE],
  ["loss", "Mean loss", LOSS],
  ["history_loss", "History", LOSS],
  ["change", "Change", LOSS_CHANGE],
];
const FEW = 15;

function showTypes(place, report) {
  if (report.types.length === 0) {
    place.append(element("p", { class: "muted" }, "No response tokens were recorded."));
    return;
  }
  const types = report.types.map((type) => ({ ...type, dropped: Math.round(type.count * (1 - type.selected_share)) }));
  const state = { by: "dropped", isRising: false, isWhole: false };
  const body = element("tbody");
  const headings = TYPE_COLUMNS.map(([name, title]) =>
    element("th", { scope: "col" }, element("button", { type: "button", onclick: () => sortBy(name) }, title)),
  );
  const more = element("button", { type: "button", class: "plain", onclick: () => show((state.isWhole = !state.isWhole)) });
  const caption = "Kinds of tokens: how often they are kept, and their mean losses";

  function sortBy(name) {
    state.isRising = state.by === name ? !state.isRising : ["text", "selected_share"].includes(name);
    state.by = name;
    show();
  }
  function show() {
    const sorted = sortedTypes(types, state);
    body.replaceChildren(...(state.isWhole ? sorted : sorted.slice(0, FEW)).map(typeRow));
    TYPE_COLUMNS.forEach(([name], index) =>
      headings[index].setAttribute("aria-sort", name !== state.by ? "none" : state.isRising ? "ascending" : "descending"),
    );
    more.textContent = state.isWhole ? `Show ${FEW}` : `Show all ${sorted.length}`;
    more.hidden = sorted.length <= FEW;
  }
  show();
  place.append(
    element("div", { class: "frame", tabindex: 0, role: "region", "aria-label": caption },
      element("table", { class: "types" },
        element("caption", { class: "unseen" }, caption), element("thead", {}, element("tr", {}, headings)), body)),
    more,
  );
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
      return element("td", {}, name === "selected_share" ? share(type[name]) : figure(type[name], format));
    }),
  );
}

function share(value) {
  const bar = element("span", { class: "share", "aria-hidden": "true" }, element("span"));
  bar.firstChild.style.inlineSize = `${100 * (value ?? 0)}%`;
  return [bar, element("span", { class: "percent" }, figure(value, SHARE))];
}
