// The difference of the arms from a baseline of the reader's choice. All numbers are computed by the campaign's own
// analysis when the page is written; this script only selects them.
const MOST_DIFFERENCES = 4;  // arms that are drawn while none is pinned
const against = explored.phases.map((phase) => phase.baseline);

const curveShown = (phase) => explored.phases[phase].curves[chosenCurve[phase]];

function shownDifferences(phase) {
  const found = curveShown(phase).differences;
  const all = found ? found.baselines[against[phase]].arms : [];
  const pinned = all.filter(([arm]) => pins[phase].has(arm));
  return [all, pinned.length ? pinned : all.slice(0, MOST_DIFFERENCES)];
}

function differenceFigure(number) {
  const phase = explored.phases[number];
  const { name, goal, differences } = curveShown(number);
  const isOwn = name === explored.metric;  // only its differences have a least effect that matters
  const form = /^(val|train)_(loss|bpb)$/.test(name) ? "+.4f" : "+.4~g";
  const [, shown] = shownDifferences(number);
  const data = [];
  shown.forEach(([arm, means, halves], order) => {
    const color = armColor(number, arm) || palette(order);
    const known = means.map((_, i) => i).filter((i) => means[i] !== null);
    const x = known.map((i) => differences.tokens[i]);
    const high = known.map((i) => means[i] + halves[i]), low = known.map((i) => means[i] - halves[i]);
    const shared = { type: "scatter", name: escaped(phase.arms[arm].name), legendgroup: String(arm), meta: { arm } };
    data.push({ ...shared, x: [...x, ...x.toReversed()], y: [...high, ...low.toReversed()], mode: "lines", fill: "toself", fillcolor: color, line: { color, width: 0 }, showlegend: false, hoverinfo: "skip" });
    data.push({
      ...shared, x, y: known.map((i) => means[i]), mode: "lines+markers", line: { color, width: 2 }, marker: { color, size: 5 }, showlegend: true,
      customdata: known.map((_, i) => [low[i], high[i]]),
      hovertemplate: `%{fullData.name}<br>%{y:${form}} [%{customdata[0]:${form}}, %{customdata[1]:${form}}] at %{x:.3s}<extra></extra>`,
    });
  });
  const band = { type: "rect", xref: "paper", yref: "y", x0: 0, x1: 1, y0: -phase.min_effect, y1: phase.min_effect, layer: "below", fillcolor: "var(--band)", line: { width: 0 } };
  const layout = {
    height: 300, margin: { l: 8, r: 16, t: 12, b: 30 }, hovermode: "closest",
    xaxis: { tickformat: "~s", rangemode: "tozero" },
    yaxis: { title: { text: `difference in ${escaped(name.length > 18 ? `${name.slice(0, 17)}…` : name)}${DIRECTIONS[goal] || ""}` }, automargin: true, zeroline: true, ...differenceRange(data) },
    shapes: isOwn && phase.min_effect ? [band] : [],
    legend: { orientation: "h", x: 0, y: -0.13, xanchor: "left", yanchor: "top" },
    meta: { kind: "differences", names: shown.length, view: [name, against[number]] },
  };
  return { data, layout };
}

const DIRECTIONS = { minimize: "   ← better", maximize: "   better →" };  // on an axis that is read upwards

// The range of the differences after the first quarter of training: at its start they are many times as large.
function differenceRange(data) {
  const end = Math.max(...data.flatMap((trace) => trace.x), 0);
  const late = data.flatMap((trace) => trace.y.filter((_, i) => trace.x[i] >= 0.25 * end));
  const [low, high] = [Math.min(0, ...late), Math.max(0, ...late)];
  return high > low ? { range: [low - 0.06 * (high - low), high + 0.06 * (high - low)] } : {};
}

// Plotly reads some HTML in names.
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

// The table against another baseline than that of the campaign, whose own table is above.
function finalTable(number) {
  const phase = explored.phases[number];
  const { differences } = curveShown(number);
  const final = differences ? differences.baselines[against[number]].final : [];
  if (against[number] === phase.baseline || !final.length) return [];
  const head = ["arm", `against ${phase.arms[against[number]].name}`, "Holm p", "verdict"];
  const rows = final.map(([arm, mean, low, high, p, verdict]) => make("tr", null,
    make("th", { scope: "row", class: "arm" }, phase.arms[arm].name),
    make("td", { class: "wide", "data-name": "difference" }, low === null ? signed(mean) : `${signed(mean)} [${signed(low)}, ${signed(high)}]`),
    make("td", { class: "number", "data-name": "Holm p" }, pText(p)),
    make("td", { class: "verdict" }, chip(verdict))));
  return [make("div", { class: "scroll" }, make("table", null,
    make("caption", { class: "hidden" }, `Arms of ${phase.name} against ${phase.arms[against[number]].name}`),
    make("thead", null, make("tr", null, head.map((text) => make("th", { scope: "col", class: text === "Holm p" && "number" }, text)))),
    make("tbody", null, rows))),
  make("p", { class: "note" }, "You chose this baseline; the answer of the campaign rests on its own. A baseline that is chosen because of what the table above says makes these p-values too small.")];
}

// Takes the baseline of the reader's choice, or the first that the metric has been compared with.
function chooseBaseline(number) {
  const control = document.querySelector(`[data-differences="${number}"]`);
  const { differences } = curveShown(number);
  const known = (option) => Boolean(differences && option.value in differences.baselines);
  for (const option of control.options) option.disabled = !known(option);
  const wanted = [...control.options].find((option) => Number(option.value) === explored.phases[number].baseline && known(option)) || [...control.options].find(known);
  if (wanted && !known(control.selectedOptions[0])) control.value = wanted.value;
  against[number] = Number(control.value);
}

function updateDifferences(number) {
  const place = document.querySelector(`[data-differences-plot="${number}"]`);
  if (!place) return;
  chooseBaseline(number);
  const [all, shown] = shownDifferences(number);
  const words = pins[number].size ? `Shown: ${shown.length} pinned.` : shown.length < all.length ? `Shown: the best ${shown.length}; pin arms in the table above to choose.` : "";
  document.querySelector(`[data-shown="${number}"]`).textContent = words;
  document.querySelector(`[data-final="${number}"]`).replaceChildren(...finalTable(number));
  if (drawn.has(place)) redraw(place);
}

document.querySelectorAll("[data-differences-plot]").forEach((place) => {
  const number = Number(place.dataset.differencesPlot);
  const control = document.querySelector(`[data-differences="${number}"]`);
  control.addEventListener("input", () => updateDifferences(number));
  show(place, () => differenceFigure(number));
  updateDifferences(number);
});

// One choice sets the metric of the curves of a phase and of their differences.
document.querySelectorAll("[data-curves]").forEach((control) => {
  const number = Number(control.dataset.curves);
  const choose = () => {
    chosenCurve[number] = Number(control.value);
    const { name, note, differences_note } = curveShown(number);
    const texts = { "curve-name": name, "curve-note": note, "differences-note": differences_note };
    for (const [place, text] of Object.entries(texts)) document.querySelectorAll(`[data-${place}="${number}"]`).forEach((element) => { element.textContent = text; });
    redrawCurves(number);
    updateDifferences(number);
  };
  control.addEventListener("input", choose);
  if (Number(control.value)) choose();  // a browser keeps the choice when it loads the page again
});

function redrawCurves(number) {
  document.querySelectorAll(`#phase-${number + 1} .plot[data-figure]`).forEach((place) => {
    if (figures[Number(place.dataset.figure)].layout.meta.kind === "curves" && drawn.has(place)) redraw(place);
  });
}

function togglePin(number, arm, button) {
  const isPinned = !pins[number].has(arm);
  if (isPinned) pins[number].add(arm); else pins[number].delete(arm);
  button.setAttribute("aria-pressed", String(isPinned));
  button.textContent = isPinned ? "pinned" : "pin";
  redrawCurves(number);
  updateDifferences(number);
}
