// What opens below an arm or a trial: its curve, its settings, its histograms, its error and a command to generate.
function detailRow(content, columns) {
  return make("tr", { class: "detail" }, make("td", { colspan: columns }, content));
}

const LOSS = "loss";  // training and validation loss together, among the metrics of a curve

function curveOf(trial, metric, style) {
  const found = trial[CURVES][metric];
  if (!found) return [];
  const { steps, tokens } = explored.grids[found[0]];
  const x = tokens.includes(null) ? steps : tokens;
  const form = /^(val|train)_(loss|bpb)$/.test(metric) ? ".4f" : ".4~g";
  return [{ type: "scatter", x, y: found[1], hovertemplate: `%{fullData.name}<br>%{y:${form}} at %{x:.3s}<extra></extra>`, ...style }];
}

// The loss before training is many times as far away as what follows, so curves begin at the first evaluation after it,
// and all of them is in the range. A trial that ended before has its whole curve.
function sinceFirstEvaluation(traces) {
  const starts = traces.filter((trace) => trace.mode === "lines+markers").flatMap((trace) => trace.x.filter((x) => x > 0));
  const start = Math.min(...starts);  // infinite without one
  return traces.map((trace) => {
    const kept = trace.x.map((_, i) => i).filter((i) => trace.x[i] >= start);
    return kept.length ? { ...trace, x: kept.map((i) => trace.x[i]), y: kept.map((i) => trace.y[i]) } : trace;
  });
}

function detailFigure(traces, metric) {
  const data = metric === LOSS ? sinceFirstEvaluation(traces) : traces;
  const values = data.flatMap((trace) => trace.y);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const range = high > low ? yRange([low - 0.06 * (high - low), high + 0.06 * (high - low)], data, {}) : {};
  const title = metric === LOSS ? "loss, nats per token" : escaped(metric);
  return { data, layout: {
    height: 240, margin: { l: 8, r: 12, t: 8, b: 28 }, hovermode: "closest", xaxis: { tickformat: "~s", rangemode: "tozero" },
    yaxis: { title: { text: title }, automargin: true, ...range }, legend: { orientation: "h", x: 0, y: -0.16, xanchor: "left", yanchor: "top" },
    meta: { kind: "detail", names: data.filter((trace) => trace.showlegend !== false).length, view: metric },
  } };
}

// A plot of the curves of some trials, and the choice of their metric; build(metric) makes the traces.
function curvePlot(label, own, build) {
  const has = (name) => own.some((trial) => trial[CURVES][name]);
  const names = [...(has("val_loss") || has("train_loss") ? [LOSS] : []), ...explored.curves.filter(has)];
  if (!names.length) return make("p", { class: "note" }, "Nothing was logged.");
  const choice = make("select", { name: "detail-curve", "aria-label": `Metric: ${label}` }, names.map((name) => make("option", null, name)));
  const note = make("p", { class: "note" });
  const place = make("div", { class: "plot", role: "img", "aria-label": label });
  const explain = () => { note.textContent = choice.value === LOSS ? "From the first evaluation on." : `${choice.value} at every logged step.`; };
  choice.addEventListener("input", () => { explain(); redraw(place); });
  explain();
  show(place, () => detailFigure(build(choice.value), choice.value));
  return [make("div", { class: "tools" }, make("label", null, "Curve of ", choice)), place, note];
}

function diffTable(phase, arm) {
  const { diff } = explored.phases[phase].arms[arm];
  if (arm === explored.phases[phase].baseline) return make("p", { class: "note" }, "This is the baseline of the phase.");
  if (!diff.length) return make("p", { class: "note" }, "No setting differs from the baseline.");
  return make("table", null, make("caption", { class: "hidden" }, "Settings that differ from the baseline"),
    make("thead", null, make("tr", null, ["setting", "baseline", "here"].map((text) => make("th", { scope: "col" }, text)))),
    make("tbody", null, diff.map(([name, before, after]) => make("tr", null, make("th", { scope: "row", class: "setting full" }, name), make("td", { class: "setting", "data-name": "baseline" }, make("del", null, before)), make("td", { class: "setting", "data-name": "here" }, make("ins", null, after))))));
}

function facts(pairs) {
  return make("dl", { class: "facts" }, pairs.filter(([, value]) => value !== null && value !== "").map(([name, value]) => [make("dt", null, name), make("dd", null, value)]));
}

// One histogram per step, as a symmetric shape around the step's place.
function violin(name, rows) {
  const width = 240, height = 110, left = 44, bottom = 16, right = 6;
  const low = Math.min(...rows.map((row) => row[1])), high = Math.max(...rows.map((row) => row[2]));
  const y = (value) => 6 + (height - bottom - 6) * (1 - (value - low) / (high - low || 1));
  const slot = (width - left - right) / rows.length;
  const shapes = rows.map(([step, first, last, counts], k) => {
    const middle = left + slot * (k + 0.5), most = Math.max(...counts) || 1;
    const edge = (i) => y(first + ((last - first) * i) / counts.length);
    const half = (bin) => (slot * 0.42 * counts[bin]) / most;
    const side = (sign) => counts.flatMap((_, bin) => [`${(middle + sign * half(bin)).toFixed(1)},${edge(bin).toFixed(1)}`, `${(middle + sign * half(bin)).toFixed(1)},${edge(bin + 1).toFixed(1)}`]);
    return [make("path", { d: `M${[...side(1), ...side(-1).toReversed()].join("L")}Z` }, make("title", null, `step ${step}: ${small(first)} to ${small(last)}`)),
      make("text", { x: middle, y: height - 4, "text-anchor": "middle" }, count(step))];
  });
  const ticks = [low, high].map((value) => [make("line", { x1: left, x2: width - right, y1: y(value), y2: y(value) }), make("text", { x: left - 5, y: y(value) + 3, "text-anchor": "end" }, Number(value.toPrecision(3)).toString())]);
  const label = `Histograms of ${name} over steps ${rows.map((row) => row[0]).join(", ")}, from ${small(low)} to ${small(high)}`;
  return make("figure", null, make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, ticks, shapes), make("figcaption", null, name));
}

function histograms(id) {
  const found = explored.histograms[id];
  if (!found) return null;
  return make("div", { class: "wide" }, make("h4", null, "Histograms over steps; r/… and alpha/… by sublayer and layer"), make("div", { class: "violins" }, Object.entries(found).map(([name, rows]) => violin(name, rows))));
}

function sample(id) {
  const text = explored.samples[id];
  return text ? make("div", { class: "wide" }, make("h4", null, "Text that it wrote without a prompt"), make("pre", { class: "sample" }, text)) : null;
}

// The folder of the results: that of this page, if it was opened as a file; otherwise where campaigns write by default.
function resultsFolder() {
  if (location.protocol === "file:") return decodeURIComponent(location.pathname).replace(/\/[^/]*$/, "");
  return `results/${explored.campaign}`;
}

const shellQuoted = (text) => /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;

function command(trial) {
  if (trial[STATUS] !== "finished") return null;
  const text = `python -m ngpt.generate ${shellQuoted(`${resultsFolder()}/trials/${trial[ID]}`)} --prompt "The file" --max-tokens 100`;
  const button = make("button", { type: "button" }, "copy");
  const code = make("pre", { "data-command": true }, text);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
    } catch {  // no right to the clipboard: select it instead
      getSelection().selectAllChildren(code);
      button.textContent = "selected";
    }
  });
  return make("div", { class: "wide" }, make("h4", null, "Generate text with it"), make("div", { class: "command" }, code, make("span", { class: "tools screen" }, button)));
}

function trialDetail(i) {
  const trial = trials[i];
  const phase = explored.phases[trial[PHASE]];
  const twin = trial[ARM] === phase.baseline ? null : trials.find((other) => other[PHASE] === trial[PHASE] && other[ARM] === phase.baseline && other[SEED] === trial[SEED]);
  const color = "var(--s1)";
  const baseline = { name: "baseline, same seed", mode: "lines", line: { color: "var(--baseline)", width: 1.5, dash: "dot" } };
  const curves = (metric) => metric === LOSS ? [
    ...(twin ? curveOf(twin, "val_loss", baseline) : []),
    ...curveOf(trial, "train_loss", { name: "training", mode: "lines", opacity: 0.55, line: { color, width: 1 } }),
    ...curveOf(trial, "val_loss", { name: "validation", mode: "lines+markers", line: { color, width: 2 }, marker: { color, size: 5 } }),
  ] : [
    ...(twin ? curveOf(twin, metric, baseline) : []),
    ...curveOf(trial, metric, { name: "this trial", mode: "lines+markers", line: { color, width: 1.5 }, marker: { color, size: 4 } }),
  ];
  const numbers = explored.metrics.map((name) => [name, trial[METRICS][explored.metrics.indexOf(name)]]).filter(([, value]) => value !== null);
  const error = trial[ERROR] ? make("div", { class: "wide failure" }, chip(trial[STATUS]), make("p", { class: "exception" }, trial[ERROR])) : null;
  return make("div", { class: "detail-body" }, error,
    make("div", null, curvePlot(`Curve of ${armOf(trial).name}, seed ${trial[SEED]}`, [trial], curves), make("h4", null, "Settings against the baseline"), diffTable(trial[PHASE], trial[ARM])),
    make("div", null, make("h4", null, "Numbers"), facts([["trial", trial[ID]], ...numbers.map(([name, value]) => [name, metricText(value)])])),
    histograms(trial[ID]), sample(trial[ID]), command(trial));
}

function armDetail(number, arm) {
  const phase = explored.phases[number];
  const own = trials.map((_, i) => i).filter((i) => trials[i][PHASE] === number && trials[i][ARM] === arm);
  const lossOf = (trial) => trial[CURVES].val_loss ? "val_loss" : "train_loss";
  const curves = (metric) => own.flatMap((i, k) => curveOf(trials[i], metric === LOSS ? lossOf(trials[i]) : metric, { name: `seed ${trials[i][SEED]}`, mode: "lines+markers", line: { color: palette(k), width: 1.5 }, marker: { color: palette(k), size: 4 } }));
  const list = own.map((i) => {
    const button = make("button", { type: "button" }, `seed ${trials[i][SEED]}: ${metricText(metricOf(trials[i], explored.metric))}`);
    button.addEventListener("click", () => openTrial(i));
    return button;
  });
  const [first, writer] = [explored.histograms, explored.samples].map((found) => own.find((i) => found[trials[i][ID]]));
  return make("div", { class: "detail-body" },
    make("div", null, curvePlot(`Curve of each seed of ${phase.arms[arm].name}`, own.map((i) => trials[i]), curves)),
    make("div", null, make("h4", null, "Settings against the baseline"), diffTable(number, arm), make("h4", null, "Its trials"), make("div", { class: "tools" }, list)),
    first === undefined ? null : histograms(trials[first][ID]),
    writer === undefined ? null : sample(trials[writer][ID]),
    own.length && trials[own[0]][STATUS] === "finished" ? command(trials[own[0]]) : null);
}

// The names of arms in the tables become buttons; beside each is one that pins the arm in the figures.
document.querySelectorAll("tr[data-arm]").forEach((row) => {
  const [number, arm] = [Number(row.dataset.phase), Number(row.dataset.arm)];
  const name = row.querySelector(".arm b");
  const pin = make("button", { type: "button", class: "pin screen", "aria-pressed": "false", "aria-label": `Pin ${name.textContent} in the figures` }, "pin");
  pin.addEventListener("click", () => togglePin(number, arm, pin));
  name.after(pin);
  if (!trials.length) return;
  const button = make("button", { type: "button", class: "plain open", "aria-expanded": "false" });
  name.replaceWith(button);
  button.append(name);
  button.addEventListener("click", () => {
    const open = button.getAttribute("aria-expanded") !== "true";
    button.setAttribute("aria-expanded", String(open));
    if (open) row.after(detailRow(armDetail(number, arm), row.cells.length)); else row.nextElementSibling.remove();
  });
});

// On paper all tables are whole, everything folded is open, and the colours are light.
let folded = [];
addEventListener("beforeprint", () => {
  document.documentElement.classList.add("printing");
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((element) => { element.open = true; });
  if (form && view.limit < MOST_PRINTED) { view.limit = MOST_PRINTED; renderTrials(); }
  redrawAll(680);
}, { signal: life.signal });
addEventListener("afterprint", () => {
  document.documentElement.classList.remove("printing");
  folded.forEach((element) => { element.open = false; });
  redrawAll();
}, { signal: life.signal });
