// All samples: what is chosen of them, how they are shown, pages, and the panel with the figures of one token.

const PER_PAGE = 10;
const ORDERS = [
  ["given", "watched first"],
  ["dropped_share", "most dropped"],
  ["drift", "most drifted"],
  ["top_score", "top single score"],
];
const MARKINGS = [
  ["underlined", "underlined"],
  ["greyed", "underlined, grey"],
  ["unmarked", "not marked"],
];

function showSamples(place, report) {
  if (report.samples.length === 0) {
    place.append(element("p", { class: "muted" }, "No token records were found: logging.records_every writes them."));
    return;
  }
  const steps = recordedSteps(report.samples); // of the samples on the page: at others there would be nothing to see
  const view = {
    step: steps.at(-1), metric: "score", marking: "underlined", // how samples are shown
    order: "given", search: "", source: "", onlyHere: steps.length > 1, page: 0, // which ones
  };
  const panel = tokenPanel();
  const list = element("div", { class: "list" });
  const status = element("p", { class: "muted", role: "status" });
  const legend = element("div", { class: "legend shades" });
  const pagers = [pager(turnTo), pager(turnTo)];
  const scales = new Map();
  const openings = openingsOf(report.samples);
  let shown = [];

  function scaleOf(metric) {
    if (!scales.has(metric)) scales.set(metric, metricScale(report.samples, metric));
    return scales.get(metric);
  }
  /** New samples on the page. */
  function refill() {
    const found = chosenSamples(report.samples, view);
    const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
    view.page = Math.min(view.page, pages - 1);
    shown = withOpeningsOnce(found.slice(view.page * PER_PAGE, (view.page + 1) * PER_PAGE));
    list.replaceChildren(...shown.map((one) => one.node));
    status.textContent = statusText(found.length, report.samples.length, view.page);
    pagers.forEach((one) => one.show(view.page, pages));
    panel.clear();
    repaint();
  }
  /** Of samples that begin alike, the first on a page shows it. */
  function withOpeningsOnce(samples) {
    const shownIn = new Map();
    return samples.map((sample) => {
      const [length, key] = openings.get(sample) ?? [];
      const earlier = shownIn.get(key);
      if (length && earlier === undefined) shownIn.set(key, sample.sample);
      return makeSample(sample, length && earlier !== undefined ? { length, shownIn: earlier } : null);
    });
  }
  /** The same samples, seen otherwise. */
  function repaint() {
    view.scale = scaleOf(view.metric);
    list.dataset.marking = view.marking;
    shown.forEach((one) => paintSample(one, view));
    legend.replaceChildren(...shadeLegend(view));
    panel.refresh(view);
  }
  function change(changes) {
    Object.assign(view, { page: 0 }, changes);
    refill();
  }
  function look(changes) {
    Object.assign(view, changes);
    if ("step" in changes && (view.onlyHere || view.order !== "given")) change({});
    else repaint();
  }
  function turnTo(page) {
    view.page = page;
    refill();
    place.scrollIntoView({ block: "start" });
  }
  function tokenOf(event) {
    const token = event.target.closest?.(".token");
    if (!token) return null;
    const one = shown.find(({ node }) => node.contains(token));
    return one ? { one, index: Number(token.dataset.index) } : null;
  }
  function point(event, isTold) {
    const found = tokenOf(event);
    if (found) panel.show(found.one.sample, found.index, view, isTold);
  }
  function moveByKey(event) {
    const found = tokenOf(event);
    if (!found || event.ctrlKey || event.metaKey || event.altKey) return;
    const next = tokenAfter(event.key, found.one.tokens, found.index, found.one.firstShown());
    if (next === null) return;
    event.preventDefault();
    found.one.tokens[next].focus();
  }
  function focused(event) {
    const found = tokenOf(event);
    if (!found) return;
    found.one.tokens.forEach((token) => (token.tabIndex = -1));
    found.one.tokens[found.index].tabIndex = 0;
    point(event, true);
  }
  list.addEventListener("pointerover", (event) => point(event, false));
  list.addEventListener("click", (event) => point(event, false));
  list.addEventListener("focusin", focused);
  list.addEventListener("keydown", moveByKey);

  const only = element("input", { type: "checkbox", id: "only-here", checked: view.onlyHere, onchange: () => change({ onlyHere: only.checked }) });
  const bar = element("div", { class: "bar" }, controls(report, steps, view, { change, look }), legend);
  new ResizeObserver(() => place.style.setProperty("--bar", `${bar.offsetHeight}px`)).observe(bar); // what is below keeps clear of it
  place.append(
    bar,
    element(
      "div",
      { class: "line" },
      status,
      steps.length > 1 ? element("label", { class: "small" }, only, " only samples recorded at this step") : null,
      pagers[0].node,
    ),
    element("div", { class: "beside" }, list, panel.node),
    element("div", { class: "line" }, pagers[1].node),
  );
  refill();
}

function recordedSteps(samples) {
  return unique(samples.flatMap((sample) => Object.keys(sample.at).map(Number))).sort((a, b) => a - b);
}

function controls(report, steps, view, { change, look }) {
  const sources = unique(report.samples.map((sample) => sample.source).filter((source) => source !== null)).sort();
  const hasEntropy = report.samples.some((sample) => Object.values(sample.at).some((values) => values.entropy));
  const metrics = METRICS.filter(([name]) => name !== "entropy" || hasEntropy);
  const find = later(() => change({ search: search.value.toLowerCase() }));
  const search = element("input", { type: "search", id: "search", autocomplete: "off", spellcheck: "false", dir: "auto", oninput: find });
  return element(
    "div",
    { class: "controls" },
    steps.length > 1 ? stepSlider(steps, view, look) : null,
    choice("metric", "Shade by", metrics, view.metric, (metric) => look({ metric })),
    choice("marking", "Dropped tokens", MARKINGS, view.marking, (marking) => look({ marking })),
    choice("order", "Order", ORDERS, view.order, (order) => change({ order })),
    sources.length > 1 ? choice("source", "Source", sourceOptions(sources), "", (source) => change({ source })) : null,
    element("label", { class: "field" }, element("span", {}, "Search text"), search),
  );
}

function sourceOptions(sources) {
  return [["", "all"], ...sources.map((source) => [source, source])];
}

function stepSlider(steps, view, look) {
  const output = element("output", { for: "step" });
  const slider = element("input", { type: "range", id: "step", min: 0, max: steps.length - 1, step: 1, value: steps.indexOf(view.step) });
  const tell = () => {
    output.textContent = figure(steps[slider.value]);
    slider.setAttribute("aria-valuetext", `step ${output.textContent}`);
  };
  slider.addEventListener("input", () => {
    tell();
    look({ step: steps[slider.value] });
  });
  tell();
  return element("label", { class: "field wide" }, element("span", {}, "Step ", output), slider);
}

/** Calls back once a person has paused. */
function later(call) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(call, 150);
  };
}

function chosenSamples(samples, { order, search, source, onlyHere, step }) {
  const found = samples.filter(
    (sample) =>
      (source === "" || sample.source === source) &&
      (!onlyHere || String(step) in sample.at) &&
      (search === "" || sample.tokens.text.join("").toLowerCase().includes(search)),
  );
  if (order === "given") return found;
  const value = (sample) => figureAt(sample, order, step) ?? -Infinity;
  return found.sort((a, b) => value(b) - value(a) || 0);
}

/** A figure that samples are ordered by, at a step: the report has that of the whole sample, for one of its steps. */
function figureAt(sample, name, step) {
  const { now, values } = recordsAt(sample, step);
  return now === sample.step ? sample[name] : figuresOfShown(sample, values)[name];
}

/** From where to where a metric is shaded: between its 2nd and its 98th percentile, so that few values do not take it all. */
function metricScale(samples, metric) {
  const recorded = samples.flatMap((sample) => Object.values(sample.at).map((at) => at[metric] ?? []));
  const values = Float64Array.from(recorded.flat().filter(isNumber)).sort();
  if (values.length === 0) return null;
  const at = (share) => values[Math.round(share * (values.length - 1))];
  const [low, high] = [at(0.02), at(0.98)];
  return { low, high, goesLower: values[0] < low, goesHigher: values.at(-1) > high, power: NATS.includes(metric) ? 0.5 : 1 };
}

function shadeLegend(view) {
  const name = METRICS.find(([metric]) => metric === view.metric)[1];
  if (view.scale === null) return [element("span", {}, `${name} was not recorded.`)];
  const { low, high, goesLower, goesHigher } = view.scale;
  const [from, to] = [`${figure(low)}${goesLower ? " or less" : ""}`, `${figure(high)}${goesHigher ? " or more" : ""}`];
  const values = Array.from({ length: SHADES + 1 }, (_, index) => low + (index / SHADES) * (high - low));
  const cells = values.map((value) => element("span", { class: `cell ${shadeOf(value, view.scale)}` }));
  return [
    element("span", {}, `${name} ${from} `, element("span", { class: "scale", "aria-hidden": "true" }, cells), ` ${to}`),
    element("span", { class: "list", "data-marking": view.marking }, element("span", { class: "token dropped shade-2" }, "dropped")),
    element("span", {}, element("span", { class: "token kept flipped" }, "newly kept"), " ",
      element("span", { class: "list", "data-marking": view.marking }, element("span", { class: "token dropped flipped" }, "newly dropped")),
      " since the record before"),
    element("span", {}, element("span", { class: "token context" }, "grey"), " context"),
  ];
}

function statusText(found, all, page) {
  const inAll = found < all ? ` of ${figure(all, WHOLE)}` : "";
  if (found === 0) return `No sample${inAll} fits.`;
  const first = page * PER_PAGE + 1;
  const last = Math.min(found, first + PER_PAGE - 1);
  const which = found > PER_PAGE ? `, ${first} to ${last} of them here` : "";
  return `${figure(found, WHOLE)}${inAll} ${all === 1 ? "sample" : "samples"}${which}`;
}

function pager(turnTo) {
  let at = 0;
  const back = element("button", { type: "button", onclick: () => turnTo(at - 1) }, "← Previous");
  const on = element("button", { type: "button", onclick: () => turnTo(at + 1) }, "Next →");
  const place = element("span", { class: "muted" });
  const node = element("nav", { class: "pager", "aria-label": "Pages of samples" }, back, place, on);
  function show(page, pages) {
    at = page;
    node.hidden = pages === 1;
    place.textContent = `page ${page + 1} of ${pages}`;
    back.disabled = page === 0;
    on.disabled = page === pages - 1;
  }
  return { node, show };
}

/** The figures of the token that is pointed at; told aloud when keys led to it. */
function tokenPanel() {
  const text = element("p", { class: "panel-text" });
  const figures = element("dl", {});
  const hint = element("p", { class: "muted hint" }, "Point at a token to read its figures.");
  const told = element("p", { class: "unseen", "aria-live": "polite" });
  const node = element("aside", { class: "panel", "aria-label": "Figures of a token" }, hint, text, figures, told);
  let current = null;

  function show(sample, index, view, isTold) {
    current = { sample, index };
    const known = figuresOf(sample, index, view.step);
    hint.hidden = true;
    text.replaceChildren(loneToken(sample.tokens.text[index]));
    figures.replaceChildren(...known.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
    if (isTold) told.textContent = known.filter(([, value]) => value !== "–").map((pair) => pair.join(" ")).join(", ");
  }
  function refresh(view) {
    if (current) show(current.sample, current.index, view, false);
  }
  function clear() {
    current = null;
    hint.hidden = false;
    text.replaceChildren();
    figures.replaceChildren();
  }
  return { node, show, refresh, clear };
}
