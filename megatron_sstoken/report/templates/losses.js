// Loss curves: one panel for each loss, all runs in it.

const PANELS = [
  ["loss/validation", "Validation"],
  ["loss/all", "All response tokens"],
  ["loss/selected", "Selected tokens"],
  ["loss/dropped", "Dropped tokens"],
  ["loss/dropped_minus_history", "Dropped − history"],
];
const SOURCE = "loss/source/";

function showLosses(place, report) {
  const panels = panelsOf(report.runs, PANELS);
  const names = unique(report.runs.flatMap((run) => Object.keys(run.curves).filter((name) => name.startsWith(SOURCE)))).sort();
  const sources = panelsOf(report.runs, names.map((name) => [name, name.slice(SOURCE.length)]));
  if (panels.length === 0) {
    place.append(element("p", { class: "muted" }, "No losses were found: neither metrics.jsonl nor TensorBoard events."));
    return;
  }
  place.append(
    charts(panels),
    onDemand("Show as tables", () => element("div", {}, [...panels, ...sources].map(curveTable))),
  );
  if (sources.length) place.append(onDemand(`By source (${sources.length})`, () => charts(sources)));
}

function charts(panels) {
  const heightOf = (index) => (index === 0 ? 260 : 180);
  return element("div", { class: "charts" }, panels.map((panel, index) => lineChart({ ...panel, height: heightOf(index) })));
}

function panelsOf(runs, named) {
  return named.map(([name, title]) => ({ title, series: seriesOf(runs, name) })).filter(({ series }) => series.length > 0);
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
