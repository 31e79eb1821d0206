// The distribution of scores at one step.

function showScores(place, report) {
  const steps = Object.keys(report.scores).sort((a, b) => Number(a) - Number(b));
  if (steps.length === 0) {
    place.append(element("p", { class: "muted" }, "No scores were recorded."));
    return;
  }
  const counts = element("p", { class: "legend", role: "status" });
  const picture = element("div");
  const show = (step) => {
    counts.replaceChildren(...countsAt(report.scores[step]));
    picture.replaceChildren(...scoresAt(step, report.scores[step]));
  };
  if (steps.length > 1) {
    const options = steps.map((step) => [step, figure(Number(step))]);
    place.append(element("div", { class: "controls" }, choice("scores-step", "Step", options, steps.at(-1), show)));
  }
  place.append(counts, picture);
  show(steps.at(-1));
}

function countsAt({ selected, dropped, threshold: mark }) {
  const total = (counts) => counts.reduce((a, b) => a + b, 0);
  const kept = total(selected);
  const all = kept + total(dropped);
  const share = figure(all ? kept / all : null, SHARE);
  const limit = isNumber(mark)
    ? `The threshold is ${figure(mark)}.`
    : "There is no single threshold: each sample, or each batch, has its own.";
  return [
    element("span", {}, element("span", { class: "key up" }), `${figure(kept, WHOLE)} selected (${share})`),
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
  return [
    mirroredHistogram({ edges, up: selected, down: dropped, mark, markText: `threshold ${figure(mark)}`, height: 240 }),
    onDemand("Show as table", () => table(`Scores at step ${step}`, ["Score", "Selected", "Dropped"], rows)),
  ];
}
