// What each run was: settings that differ from the defaults side by side, and where and with what it ran.

function showSettings(place, report) {
  const runs = report.runs;
  if (runs.length === 0) {
    place.append(element("p", { class: "muted" }, "Nothing is known of the run: records alone were given."));
    return;
  }
  const columns = () => ["", ...runs.map((run) => given(run.name))];
  const names = unique(runs.flatMap((run) => Object.keys(run.changed).filter((name) => isRead(run, name.split(".")[0])))).sort();
  place.append(
    names.length
      ? table("Settings that differ from their defaults", columns(), names.map((name) => changedRow(name, runs)))
      : element("p", { class: "muted" }, "No settings are known, or all have their defaults."),
    element("p", { class: "muted small" }, "Settings that differ from their defaults. ≠ marks those that the runs do not share."),
    table("Versions and circumstances", columns(), circumstances(runs)),
    ...runs.filter((run) => run.command).map(commandOf),
    ...runs.map((run) => onDemand(["All settings of ", given(run.name)], () => allSettings(run))),
  );
}

function changedRow(name, runs) {
  const values = runs.map((run) => (name in run.changed ? run.changed[name] : settingOf(run, name)));
  const known = unique(values.filter((value) => value !== undefined).map((value) => JSON.stringify(value)));
  const shown = values.map((value, index) =>
    element("span", { class: name in runs[index].changed ? null : "muted" }, breakable(settingText(value))),
  );
  const mark = known.length < 2 ? null : element("abbr", { class: "differs", title: "not the same in all runs" }, " ≠");
  return [[breakable(name), mark], ...shown];
}

/** Text that a narrow column breaks where the parts of a name or a path end. */
function breakable(text) {
  const node = given("");
  node.append(...text.split(/(?<=[./_-])/).flatMap((part) => [part, element("wbr")]));
  return node;
}

/** A setting of a run, undefined where it is not known. */
function settingOf(run, name) {
  const [section, ...rest] = name.split(".");
  return run.settings?.[section]?.[rest.join(".")];
}

function settingText(value) {
  if (value === undefined) return "–";
  return typeof value === "string" ? value : JSON.stringify(value);
}

function circumstances(runs) {
  const versions = unique(runs.flatMap((run) => Object.keys(run.versions ?? {})));
  const facts = [
    ["Method", (run) => run.method],
    ["Folder", (run) => run.folder],
    ["Commit", (run) => run.commit],
    ["Start", (run) => run.start],
    ["End", (run) => run.end],
    ["Ended", (run) => run.ended],
    ...versions.map((name) => [name, (run) => run.versions?.[name]]),
  ];
  return facts
    .filter(([, of]) => runs.some((run) => of(run) !== null && of(run) !== undefined))
    .map(([title, of]) => [given(title), ...runs.map((run) => breakable(settingText(of(run) ?? undefined)))]);
}

/** The whole command, which one click selects; its lines break between words alone, where they have room. */
function commandOf(run) {
  const words = run.command.split(" ").flatMap((word, index) => [index ? " " : "", element("span", {}, word)]);
  return element("div", { class: "command" }, element("h3", {}, "Command of ", given(run.name)), element("code", { dir: "ltr" }, words));
}

/** `hardware` is what a plan assumes: beside a run without a GPU it would read as what it ran on. */
function isRead(run, section) {
  return section !== "hardware" || run.versions?.device !== "cpu";
}

function allSettings(run) {
  const rows = Object.entries(run.settings ?? {}).filter(([section]) => isRead(run, section)).flatMap(([section, settings]) =>
    Object.entries(settings ?? {}).map(([name, value]) => [breakable(`${section}.${name}`), breakable(settingText(value))]),
  );
  return table(`All settings of ${run.name}`, ["Setting", "Value"], rows);
}
