// The table of trials: sorted, filtered and grouped by any setting.
const [PHASE, ARM, SEED, ID, STATUS, REUSED, ERROR, METRICS, CURVES] = [0, 1, 2, 3, 4, 5, 6, 7, 8];
const PAGE_ROWS = 100;  // rows that are shown at first, and added by a click
const MOST_PRINTED = 2000;
const trials = explored.trials;
const form = document.getElementById("filters");
const view = { sort: null, descending: false, limit: PAGE_ROWS };
const opened = new Set();  // indices of opened trials

const phaseName = (trial) => explored.phases[trial[PHASE]].name;
const armOf = (trial) => explored.phases[trial[PHASE]].arms[trial[ARM]];
const metricOf = (trial, name) => trial[METRICS][explored.metrics.indexOf(name)];
const chosenMetric = () => explored.metrics[Number(form.elements.metric.value)];

function trialColumns() {
  const metric = chosenMetric();
  const names = [...new Set([metric, "tokens_per_second", "tokens"])].filter((name) => explored.metrics.includes(name));
  return [
    { key: "arm", title: "arm", value: (i) => armOf(trials[i]).name },
    { key: "phase", title: "phase", value: (i) => trials[i][PHASE], text: (i) => phaseName(trials[i]) },
    { key: "seed", title: "seed", value: (i) => trials[i][SEED], numeric: true },
    { key: "status", title: "status", value: (i) => trials[i][STATUS] },
    ...names.map((name) => ({ key: name, title: name === "tokens_per_second" ? "tok/s" : name, value: (i) => metricOf(trials[i], name), text: (i) => metricText(metricOf(trials[i], name)), numeric: true })),
  ];
}

const GROUP_COLUMNS = [
  { key: "group", title: "group", value: (row) => row.group },
  { key: "n", title: "n", value: (row) => row.n, numeric: true },
  ...["mean", "sd", "stderr"].map((key) => ({ key, title: key, value: (row) => row[key], text: (row) => metricText(row[key]), numeric: true })),
];

// The text of a trial, and its seed and settings as `name=value`.
function haystack(trial) {
  const arm = armOf(trial);
  const values = [`seed=${trial[SEED]}`, ...explored.settings.map((name, i) => `${name}=${arm.settings[i]}`)].map((value) => value.toLowerCase());
  return { values, text: [arm.name, phaseName(trial), trial[ID], trial[ERROR], ...values].join("\n").toLowerCase() };
}
const haystacks = trials.map(haystack);

// Which trials a word finds: `name=value` those with exactly this value, so that seed=1 finds no seed 12. A word that is
// the value of no trial, as while it is typed, is looked for anywhere in the text.
function finder(word) {
  const hasValue = ({ values }) => values.some((value) => value === word || value.endsWith(`.${word}`));
  return word.includes("=") && haystacks.some(hasValue) ? hasValue : ({ text }) => text.includes(word);
}

function matching() {
  const { phase, status, text } = form.elements;
  const finders = text.value.toLowerCase().split(/\s+/).filter(Boolean).map(finder);
  return trials.map((_, i) => i).filter((i) => (phase.value === "" || trials[i][PHASE] === Number(phase.value))
    && (status.value === "" || trials[i][STATUS] === status.value) && finders.every((finds) => finds(haystacks[i])));
}

function groupName(trial, by) {
  if (by === "phase") return phaseName(trial);
  if (by === "arm") return armOf(trial).name;
  return by === "status" ? trial[STATUS] : armOf(trial).settings[Number(by.slice("setting:".length))];
}

// Number of values, mean, sample standard deviation and standard error of the metric in each group. A trial that several
// phases use counts once in a group.
function grouped(rows, by) {
  const groups = new Map();
  const metric = chosenMetric();
  for (const i of rows) {
    const name = groupName(trials[i], by);
    if (!groups.has(name)) groups.set(name, new Map());
    const value = metricOf(trials[i], metric);
    if (value !== null) groups.get(name).set(trials[i][ID], value);
  }
  return [...groups].map(([group, byTrial]) => {
    const values = [...byTrial.values()];
    const n = values.length;
    const mean = n ? values.reduce((sum, x) => sum + x, 0) / n : null;
    const sd = n > 1 ? Math.sqrt(values.reduce((sum, x) => sum + (x - mean) ** 2, 0) / (n - 1)) : null;
    return { group, n, mean, sd, stderr: sd === null ? null : sd / Math.sqrt(n) };
  });
}

function sorted(rows, columns) {
  const column = columns.find(({ key }) => key === view.sort);
  if (!column) return rows;
  const sign = view.descending ? -1 : 1;
  return rows.map((row) => [column.value(row), row]).sort(([one], [other]) => {
    if (one === null || other === null) return (one === null) - (other === null);  // missing values are always last
    return sign * (typeof one === "number" ? one - other : compareTexts(one, other));
  }).map(([, row]) => row);
}

function headCell(column) {
  const isSorted = view.sort === column.key;
  const button = make("button", { type: "button", class: "plain", "data-sort": column.key }, column.title);
  button.addEventListener("click", () => {
    [view.sort, view.descending] = [column.key, isSorted && !view.descending];
    renderTrials();
    document.querySelector(`#trial-table [data-sort="${CSS.escape(column.key)}"]`).focus();
  });
  const order = isSorted ? (view.descending ? "descending" : "ascending") : "none";
  return make("th", { scope: "col", "aria-sort": order, "aria-label": column.title, class: column.numeric && "number" }, button);
}

function cellOf(column, row) {
  const text = column.text ? column.text(row) : String(column.value(row) ?? MISSING);
  if (column.key === "status") return make("td", { class: "verdict" }, text === "finished" ? text : chip(text));
  return make("td", { class: column.numeric && "number", "data-name": column.title }, text);
}

function trialRows(i, columns) {
  const trial = trials[i];
  const isOpen = opened.has(i);
  const button = make("button", { type: "button", class: "plain open", "aria-expanded": String(isOpen), "data-trial": i }, make("b", null, armOf(trial).name), make("span", { class: "hidden" }, `, seed ${trial[SEED]}: details`));
  const note = trial[REUSED] ? make("div", { class: "note" }, `trained by ${trial[REUSED]}`) : null;
  const row = make("tr", null, make("th", { scope: "row", class: "arm" }, button, note), columns.slice(1).map((column) => cellOf(column, i)));
  button.addEventListener("click", () => {
    const open = !opened.has(i);
    if (open) opened.add(i); else opened.delete(i);
    button.setAttribute("aria-expanded", String(open));
    if (open) row.after(detailRow(trialDetail(i), columns.length)); else row.nextElementSibling.remove();
  });
  return isOpen ? [row, detailRow(trialDetail(i), columns.length)] : [row];
}

function renderTrials() {
  const by = form.elements.group.value;
  const found = matching();
  const columns = by ? GROUP_COLUMNS : trialColumns();
  const rows = sorted(by ? grouped(found, by) : found, columns);
  const table = document.getElementById("trial-table");
  table.tHead.replaceChildren(make("tr", null, columns.map((column) => headCell(column.key === "group" ? { ...column, title: form.elements.group.selectedOptions[0].text } : column))));
  const shown = rows.slice(0, view.limit);
  sortChoices(columns);
  table.tBodies[0].replaceChildren(...shown.flatMap((row) => by
    ? [make("tr", null, make("th", { scope: "row", class: "arm" }, row.group), columns.slice(1).map((column) => cellOf(column, row)))]
    : trialRows(row, columns)));
  const groups = by ? ` in ${rows.length} group${rows.length === 1 ? "" : "s"}; ${chosenMetric()}` : "";
  document.getElementById("trial-count").textContent = `${found.length} of ${trials.length} trials${groups}${shown.length < rows.length ? `, the first ${shown.length} are shown` : ""}`;
  const more = document.getElementById("more-trials");
  more.hidden = shown.length === rows.length;
}

// On a narrow screen the rows are cards without a head, so a list of choices sorts them.
function sortChoices(columns) {
  const choices = columns.flatMap(({ key, title }) => [[`${key} up`, `${title} ↑`], [`${key} down`, `${title} ↓`]]);
  const current = view.sort ? `${view.sort} ${view.descending ? "down" : "up"}` : "";
  form.elements.sort.replaceChildren(...[["", "given order"], ...choices].map(([value, text]) => make("option", { value, selected: value === current }, text)));
}

// Shows a trial in the table, opened.
function openTrial(i) {
  form.reset();
  opened.add(i);
  const place = sorted(matching(), trialColumns()).indexOf(i);
  view.limit = Math.max(view.limit, place + 1);
  renderTrials();
  const button = document.querySelector(`#trial-table [data-trial="${i}"]`);
  button.scrollIntoView({ block: "center" });
  button.focus();
}

if (form) {
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    if (event.target.name === "group") view.sort = null;
    if (event.target.name === "sort") [view.sort, view.descending] = [event.target.value.split(" ")[0] || null, event.target.value.endsWith("down")];
    view.limit = PAGE_ROWS;
    renderTrials();
  });
  document.getElementById("more-trials").addEventListener("click", () => { view.limit += 5 * PAGE_ROWS; renderTrials(); });
  renderTrials();
}
