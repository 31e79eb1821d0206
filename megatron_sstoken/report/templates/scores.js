// The distribution of scores at one step.

/** Why there is no threshold that all tokens share, by what competes. */
const NO_THRESHOLD = {
  sample: "The tokens of each sample compete among themselves, so each sample has a threshold of its own.",
  microbatch: "The tokens of each micro-batch compete among themselves, so each micro-batch has a threshold of its own.",
  batch: "All tokens of a batch compete, but some were kept whatever their score, so there is no single threshold.",
  dataset: "All tokens of the data compete, but some were kept whatever their score, so there is no single threshold.",
};

function showScores(place, report) {
  const steps = Object.keys(report.scores).sort((a, b) => Number(a) - Number(b));
  if (steps.length === 0) {
    place.append(element("p", { class: "muted" }, "No scores were recorded."));
    return;
  }
  const counts = element("p", { class: "legend", role: "status" });
  const picture = element("div");
  const show = (step) => {
    counts.replaceChildren(...countsAt(report.scores[step], report.selection.scope));
    picture.replaceChildren(...scoresAt(step, report.scores[step]));
  };
  if (steps.length > 1) {
    const options = steps.map((step) => [step, figure(Number(step))]);
    place.append(element("div", { class: "controls" }, choice("scores-step", "Step", options, steps.at(-1), show)));
  }
  place.append(counts, picture);
  show(steps.at(-1));
}

function countsAt({ selected, dropped, threshold: mark }, scope) {
  const total = (counts) => counts.reduce((a, b) => a + b, 0);
  const kept = total(selected);
  const all = kept + total(dropped);
  const share = figure(all ? kept / all : null, SHARE);
  const limit = isNumber(mark)
    ? `The threshold is ${figure(mark)}.`
    : NO_THRESHOLD[scope] ?? "There is no single threshold: tokens do not all compete with each other.";
  return [
    element("span", {}, element("span", { class: "key up" }), `${figure(kept, WHOLE)} kept (${share})`),
    element("span", {}, element("span", { class: "key down" }), `${figure(all - kept, WHOLE)} dropped`),
    element("span", { class: "muted" }, limit),
  ];
}

function scoresAt(step, { edges, selected, dropped, threshold: mark }) {
  const rows = selected.map((count, index) => [
    `${figure(edges[index])} to ${figure(edges[index + 1])}`,
    figure(count, WHOLE),
    figure(dropped[index], WHOLE),
  ]);
  const title = `Scores at step ${step}`;
  const tell = (index) => `Score ${rows[index][0]}: ${rows[index][1]} kept, ${rows[index][2]} dropped`;
  return [
    mirroredHistogram({
      title, edges, up: selected, down: dropped, mark, markText: `threshold ${figure(mark)}`, height: 240, tell,
    }),
    onDemand("Show as table", () => table(title, ["Score", "Kept", "Dropped"], rows)),
  ];
}
