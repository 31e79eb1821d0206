// Loss curves: one panel for each loss, all runs in it.

const PANELS = [
  ["loss/validation", "Validation"],
  ["loss/all", "All response tokens"],
  ["loss/selected", "Kept tokens"],
  ["loss/dropped", "Dropped tokens"],
  ["loss/dropped_minus_history", "Drift: dropped tokens, loss − history loss"],
];
const DRIFT = "loss/dropped_minus_history";
const SOURCE = "loss/source/";

function showLosses(place, report) {
  const panels = panelsOf(report.runs, PANELS, report.selection.drift_bound);
  const names = unique(report.runs.flatMap((run) => Object.keys(run.curves).filter((name) => name.startsWith(SOURCE)))).sort();
  const sources = panelsOf(report.runs, names.map((name) => [name, name.slice(SOURCE.length)]));
  if (panels.length === 0) {
    place.append(element("p", { class: "muted" }, "No losses were found: neither metrics.jsonl nor TensorBoard events."));
    return;
  }
  // One axis for all, so that what stands above each other happened at the same time.
  const range = extent([...panels, ...sources].flatMap(({ series }) => series.flatMap(({ points }) => points.map(([step]) => step))));
  place.append(
    charts(panels, range),
    onDemand("Show as tables", () => element("div", {}, [...panels, ...sources].map(curveTable))),
  );
  if (sources.length) place.append(onDemand(`By source (${sources.length})`, () => charts(sources, range)));
}

function charts(panels, range) {
  const heightOf = (index) => (index === 0 ? 260 : 180);
  return element("div", { class: "charts" }, panels.map((panel, index) => lineChart({ ...panel, range, height: heightOf(index) })));
}

function panelsOf(runs, named, bound = null) {
  const panelOf = ([name, title]) => ({ title, series: seriesOf(runs, name), bound: name === DRIFT ? bound : null });
  return named.map(panelOf).filter(({ series }) => series.length > 0);
}

function seriesOf(runs, name) {
  return runs
    .map((run, style) => ({ name: run.name, style: style % 6, points: run.curves[name] ?? [] }))
    .filter((one) => one.points.some(([, value]) => isNumber(value)));
}

function curveTable({ title, series }) {
  const steps = unique(series.flatMap((one) => one.points.map(([step]) => step))).sort((a, b) => a - b);
  const valuesAt = series.map((one) => new Map(one.points));
  const rows = steps.map((step) => [figure(step), ...valuesAt.map((values) => figure(values.get(step)))]);
  const columns = ["Step", ...series.map((one) => given(one.name))];
  return element("div", {}, element("h3", {}, given(title)), table(`${title} by step`, columns, rows));
}
