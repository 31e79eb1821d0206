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
  if (names.length) document.getElementById("subtitle").append("compared with ", ...names);
}

/** What has a value in this run in one glance, and every word's meaning on demand. */
function showFacts(place, report) {
  const known = report.facts.filter(({ value }) => value !== null);
  const pairs = known.map(({ name, value }) => element("div", {}, element("dt", {}, given(name)), element("dd", {}, given(value))));
  if (pairs.length) place.append(element("dl", {}, pairs));
  const rows = report.facts.map(({ name, value, meaning }) => [given(name), value === null ? "" : given(value), given(meaning)]);
  place.append(onDemand("What these words mean", () => table("Words of this page", ["Word", "In this run", "Meaning"], rows)));
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
    facts: showFacts,
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
