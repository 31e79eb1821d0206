// Charts as SVG, drawn at the width that they have on the screen.

/** A place that draws itself again when its width changes: draw(width) returns the picture. */
function drawnToFit(draw) {
  const place = element("div", { class: "picture" });
  let drawn = 0;
  new ResizeObserver(([entry]) => {
    const width = Math.floor(entry.contentRect.width);
    if (width === drawn || width < 40) return;
    drawn = width;
    place.replaceChildren(draw(width));
  }).observe(place);
  return place;
}

function linear([low, high], [from, to]) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

function stepScale(range, width) {
  return linear(range[0] < range[1] ? range : aired(range), [EDGE.left, width - EDGE.right]);
}

/** Round values inside a range, about `count` of them. */
function ticks([low, high], count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: Math.max(0, last - first + 1) }, (_, index) => Number(((first + index) * step).toPrecision(12)));
}

/** The range with some air around it; a single value gets a range, too. */
function aired([low, high]) {
  const air = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low - air, high + air];
}

const FEW_POINTS = 25;
const STEPS_OF_KEYS = {
  ArrowLeft: -1, ArrowDown: -1, PageDown: -10, Home: -Infinity,
  ArrowRight: 1, ArrowUp: 1, PageUp: 10, End: Infinity,
};
const EDGE = { left: 46, right: 10, top: 8, bottom: 24 };

function axes(width, height, x, y, xTicks, yTicks, shown = (value) => value) {
  const floor = height - EDGE.bottom;
  return svg(
    "g",
    { class: "axes" },
    yTicks.map((value) => [
      svg("line", { x1: EDGE.left, x2: width - EDGE.right, y1: y(value), y2: y(value) }),
      svg("text", { x: EDGE.left - 8, y: y(value), dy: "0.32em", "text-anchor": "end" }, figure(shown(value))),
    ]),
    xTicks.map((value) =>
      svg("text", { x: x(value), y: floor + 17, "text-anchor": x(value) > width - 30 ? "end" : "middle" }, figure(value)),
    ),
  );
}

/**
 * A frame in which one of `count` places is pointed at, by pointer, finger or keys; none at rest, when keys begin at the last.
 * `nearest` tells the place at (x, width); `show(index, isPointed)` shows it and returns what to tell aloud.
 */
function pointingFrame(label, count, nearest, show) {
  let at = count - 1;
  const point = (index, isPointed) => {
    at = index;
    frame.setAttribute("aria-valuenow", index);
    frame.setAttribute("aria-valuetext", show(index, isPointed));
  };
  const pointAt = (event) => {
    const box = frame.getBoundingClientRect();
    point(nearest(event.clientX - box.left, box.width), true);
  };
  const rest = () => point(count - 1, false);
  const moveByKey = (event) => {
    if (!(event.key in STEPS_OF_KEYS)) return;
    event.preventDefault();
    point(Math.min(count - 1, Math.max(0, at + STEPS_OF_KEYS[event.key])), true);
  };
  const frame = element("div", {
    class: "chart-frame",
    tabindex: 0,
    role: "slider",
    "aria-label": label,
    "aria-valuemin": 0,
    "aria-valuemax": count - 1,
    onpointermove: pointAt,
    onpointerdown: pointAt,
    onpointerleave: rest,
    onkeydown: moveByKey,
    onblur: rest,
  });
  rest();
  return frame;
}

/**
 * Lines over the steps, with a legend that tells the values at the step that is pointed at, or else each line's last.
 * `series`: [{name, style, points: [[step, value], …]}], `style` a number from 0; `range`: first and last step of the axis;
 * `bound`: a value with a line of its own, or null.
 */
function lineChart({ title, series, height, range, bound }) {
  const steps = unique(series.flatMap((one) => one.points.map(([step]) => step))).sort((a, b) => a - b);
  const valuesAt = series.map((one) => new Map(one.points));
  const cursor = { step: steps.at(-1), isPointed: false, move: () => {} };
  const place = element("span", { class: "muted" });
  const values = series.map(() => element("span", { class: "value" }));
  const ends = unique(series.map((one) => one.points.at(-1)[0]));

  function nearest(at, width) {
    const x = stepScale(range, width);
    const distances = steps.map((step) => Math.abs(x(step) - at));
    return distances.indexOf(Math.min(...distances));
  }
  function show(index, isPointed) {
    Object.assign(cursor, { step: steps[index], isPointed });
    const shown = series.map((one, number) => figure(isPointed ? valuesAt[number].get(steps[index]) : one.points.at(-1)[1]));
    const told = series.map((one, number) => `${one.name} ${shown[number]}`);
    place.textContent = isPointed || ends.length === 1 ? `step ${figure(steps[index])}` : "each at its last step";
    values.forEach((node, number) => (node.textContent = shown[number]));
    cursor.move();
    return `${place.textContent}: ${told.join("; ")}`;
  }
  const frame = pointingFrame(`${title} by step`, steps.length, nearest, show);
  frame.append(drawnToFit((width) => drawLines(width, height, series, range, bound, cursor)));
  return element(
    "figure",
    { class: "chart" },
    element("figcaption", {}, element("h3", {}, given(title)), place),
    frame,
    element(
      "ul",
      { class: "legend" },
      series.map((one, number) => element("li", {}, swatch(one.style), given(one.name), " ", values[number])),
    ),
  );
}

function drawLines(width, height, series, range, bound, cursor) {
  const x = stepScale(range, width);
  const values = series.flatMap((one) => one.points.map(([, value]) => value));
  const yRange = aired(extent([...values, bound]));
  const y = linear(yRange, [height - EDGE.bottom, EDGE.top]);
  const guide = svg("line", { class: "guide", y1: EDGE.top, y2: height - EDGE.bottom });
  const dots = series.map((one) => svg("circle", { class: `dot style-${one.style}`, r: 4 }));
  const xTicks = ticks(range, Math.max(2, width / 90)).filter(Number.isInteger);
  cursor.move = () => {
    guide.setAttribute("visibility", cursor.isPointed ? "visible" : "hidden");
    guide.setAttribute("x1", x(cursor.step));
    guide.setAttribute("x2", x(cursor.step));
    series.forEach((one, number) => {
      const point = one.points.find(([at]) => at === cursor.step);
      const isSeen = point !== undefined && isNumber(point[1]) && (cursor.isPointed || one.points.length === 1);
      dots[number].setAttribute("visibility", isSeen ? "visible" : "hidden");
      if (isSeen) dots[number].setAttribute("cx", x(cursor.step));
      if (isSeen) dots[number].setAttribute("cy", y(point[1]));
    });
  };
  cursor.move();
  return svg(
    "svg",
    { width, height, "aria-hidden": "true" },
    axes(width, height, x, y, xTicks, ticks(yRange, Math.max(2, height / 50))),
    isNumber(bound) ? boundLine(y(bound), width, `bound ${figure(bound)}`) : null,
    series.filter((one) => one.points.length <= FEW_POINTS).map((one) => pointMarks(one, x, y)),
    series.map((one) => svg("path", { class: `line style-${one.style}`, d: path(one.points, x, y) })).reverse(),
    guide,
    dots,
  );
}

function boundLine(y, width, text) {
  return [
    svg("line", { class: "threshold", x1: EDGE.left, x2: width - EDGE.right, y1: y, y2: y }),
    svg("text", { class: "threshold-text", x: EDGE.left + 6, y: y - 5 }, text),
  ];
}

/** Lines of few points show them. */
function pointMarks({ points, style }, x, y) {
  return points
    .filter(([, value]) => isNumber(value))
    .map(([step, value]) => svg("circle", { class: `point style-${style}`, cx: x(step), cy: y(value), r: 2.5 }));
}

function path(points, x, y) {
  const seen = points.filter(([, value]) => isNumber(value));
  return seen.map(([step, value], index) => `${index ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
}

/** A piece of a run's line, for legends: colour and dashes. */
function swatch(style) {
  const line = svg("path", { class: `line style-${style}`, d: "M1 5H25" });
  return svg("svg", { class: "swatch", width: 26, height: 10, "aria-hidden": "true" }, line);
}

/**
 * Two counts for each interval, one upwards and one downwards, with a line at `mark`. `tell(index)` says in words what an
 * interval holds, which is shown below the picture when it is pointed at.
 */
function mirroredHistogram({ title, edges, up, down, mark, markText, height, tell }) {
  const hint = "Point at a bar, or move with the arrow keys, to read it.";
  const reading = element("p", { class: "muted small" }, hint);
  const cursor = { index: 0, isPointed: false, move: () => {} };
  const scale = (width) => linear([edges[0], edges.at(-1)], [EDGE.left, width - EDGE.right]);
  const nearest = (at, width) => {
    const index = edges.findIndex((edge) => scale(width)(edge) > at) - 1;
    return index === -2 ? up.length - 1 : Math.max(0, index);
  };
  const show = (index, isPointed) => {
    Object.assign(cursor, { index, isPointed });
    reading.textContent = isPointed ? tell(index) : hint;
    cursor.move();
    return tell(index);
  };
  const picture = drawnToFit((width) => {
    const x = scale(width);
    const counts = [-Math.max(0, ...down), Math.max(1, ...up)];
    const y = linear(counts, [height - EDGE.bottom, EDGE.top]);
    const span = (index) => ({ x: x(edges[index]), width: Math.max(0.5, x(edges[index + 1]) - x(edges[index]) - 1) });
    const bar = (index, count, kind) => {
      const [low, high] = [y(0), y(count)].sort((a, b) => a - b);
      return svg("rect", { class: kind, ...span(index), y: low, height: high - low });
    };
    const column = svg("rect", { class: "column", y: EDGE.top, height: height - EDGE.top - EDGE.bottom });
    cursor.move = () => {
      column.setAttribute("visibility", cursor.isPointed ? "visible" : "hidden");
      for (const [name, value] of Object.entries(span(cursor.index))) column.setAttribute(name, value);
    };
    cursor.move();
    return svg(
      "svg",
      { width, height, "aria-hidden": "true" },
      column,
      axes(width, height, x, y, ticks([edges[0], edges.at(-1)], Math.max(2, width / 90)), ticks(counts, height / 45), Math.abs),
      up.map((count, index) => bar(index, count, "up")),
      down.map((count, index) => bar(index, -count, "down")),
      svg("line", { class: "base", x1: EDGE.left, x2: width - EDGE.right, y1: y(0), y2: y(0) }),
      isNumber(mark) && mark >= edges[0] && mark <= edges.at(-1) ? threshold(x(mark), width, height, markText) : null,
    );
  });
  const frame = pointingFrame(title, up.length, nearest, show);
  frame.append(picture);
  return element("div", {}, frame, reading);
}

function threshold(x, width, height, text) {
  const isRight = x > width * 0.6;
  return [
    svg("line", { class: "threshold", x1: x, x2: x, y1: EDGE.top, y2: height - EDGE.bottom }),
    svg("text", { class: "threshold-text", x: x + (isRight ? -7 : 7), y: EDGE.top + 10, "text-anchor": isRight ? "end" : "start" }, text),
  ];
}
