// Puts the report into the page.

const QUESTIONS = [
  ["helps", "Does selection help?"],
  ["dropping", "What is it dropping?"],
  ["drifting", "Is anything drifting?"],
];

function showHead(report) {
  document.title = report.title;
  document.getElementById("title").textContent = report.title;
  const run = report.runs.find((one) => one.is_main);
  const others = report.runs.filter((one) => !one.is_main).map((one) => one.name);
  if (!run) return;
  const names = others.flatMap((name, index) => [index ? ", " : "", given(name)]);
  document.getElementById("subtitle").append("Method ", given(run.method), ...(names.length ? [", compared with ", ...names] : []));
}

function showVerdict(place, report) {
  place.append(
    ...QUESTIONS.map(([name, question]) => element("div", {}, element("h2", {}, question), element("p", { dir: "auto" }, report.verdict[name]))),
  );
}

function showNotes(place, report) {
  const notes = report.notes.map((note) => element("li", {}, given(note)));
  place.append(notes.length ? element("ul", {}, notes) : element("p", { class: "muted" }, "None."));
}

function main() {
  const report = JSON.parse(document.getElementById("report").textContent);
  const theme = document.getElementById("theme");
  theme.addEventListener("change", () => (document.documentElement.dataset.theme = theme.value));
  showHead(report);
  const parts = {
    verdict: showVerdict,
    losses: showLosses,
    scores: showScores,
    types: showTypes,
    "samples-body": showSamples,
    settings: showSettings,
    notes: showNotes,
  };
  for (const [id, show] of Object.entries(parts)) show(document.getElementById(id), report);
}

main();
