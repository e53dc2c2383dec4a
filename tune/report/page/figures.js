// Draws the figures in the colours of the style sheet, and redraws them when theme, print mode or a control changes.
const dark = matchMedia("(prefers-color-scheme: dark)");
const options = figures.map((figure) => ({ whole: false, log: false, axis: null, smoothing: 0 }));
const pins = explored.phases.map(() => new Set());  // of each phase, the indices of pinned arms
const chosenCurve = explored.phases.map(() => 0);  // of each phase, the metric of its curves and differences
const AXES = { tokens: "training tokens", steps: "steps", seconds: "seconds of training", elapsed: "seconds since the start", flops: "FLOPs" };

function resolveColors(item, key) {
  if (typeof item === "string" && /color$/.test(key)) {
    const name = /^var\((--[a-z0-9-]+)\)$/.exec(item);
    const color = name ? getComputedStyle(document.documentElement).getPropertyValue(name[1]).trim() : item;
    return key === "fillcolor" && name && name[1] !== "--band" ? color + "2b" : color;
  }
  if (Array.isArray(item)) return item.map((part) => resolveColors(part, ""));
  if (item === null || typeof item !== "object") return item;
  return Object.fromEntries(Object.entries(item).map(([name, part]) => [name, resolveColors(part, name)]));
}

// Sets the range explicitly, so that a redraw never keeps the range of the other scale.
function yRange(focus, data, { whole, log }) {
  let [low, high] = focus || [Infinity, -Infinity];
  if (whole || low > high) {
    [low, high] = [Infinity, -Infinity];
    for (const trace of data) for (const y of trace.y) { low = Math.min(low, y); high = Math.max(high, y); }
  }
  const [first, last] = log && low > 0 ? [Math.log10(low), Math.log10(high)] : [low, high];
  const space = whole || first === last ? 0.03 * (last - first) || 1 : 0;
  return { type: log && low > 0 ? "log" : "linear", range: [first - space, last + space], autorange: false };
}

// Exponential moving average with the bias of its start removed, as TensorBoard draws it.
function smoothed(values, weight) {
  let mean = 0, total = 0;
  return values.map((value) => {
    mean = weight * mean + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return mean / total;
  });
}

function xOf(trace, axis) {
  if (axis === "tokens") return trace.x;
  const found = trace.meta[axis];  // FLOPs that nobody recorded are those of one token
  return Array.isArray(found) ? found : trace.x.map((tokens) => tokens * found);
}

const palette = (n) => `var(--s${1 + (n % 7)})`;

// The colour of an arm: its own, or one of the palette once it is pinned.
function armColor(phase, arm) {
  const pinned = [...pins[phase]].filter((other) => !explored.phases[phase].arms[other].color);
  return explored.phases[phase].arms[arm].color || (pins[phase].has(arm) ? palette(pinned.indexOf(arm) + 3) : null);
}

// The traces of a figure of curves, over the chosen axis, smoothed, with the pinned arms in front.
function curveTraces(figure, phase, { axis, smoothing }) {
  const { baseline } = explored.phases[phase];
  const chosen = pins[phase];
  const traces = [];
  for (const trace of figure.data) {
    const { arm, kind } = trace.meta;
    const isFaded = chosen.size > 0 && !chosen.has(arm) && arm !== baseline;
    if (kind === "band" && (smoothing > 0 || isFaded)) continue;
    const drawn = { ...trace, x: xOf(trace, axis), y: kind === "line" && smoothing > 0 ? smoothed(trace.y, smoothing) : trace.y };
    if (isFaded) Object.assign(drawn, { line: { color: "var(--faint)", width: 1 }, opacity: 0.5, showlegend: false, mode: "lines" });
    if (chosen.has(arm) && trace.line.color === "var(--faint)") {
      const color = armColor(phase, arm);
      Object.assign(drawn, { line: { color, width: 2 }, marker: { color, size: 5 }, showlegend: true });
    }
    traces.push(drawn);
  }
  const front = (trace) => chosen.has(trace.meta.arm) ? 1 : 0;
  return traces.sort((one, other) => front(one) - front(other));
}

const phaseOf = (element) => Number(element.closest("section").id.replace("phase-", "")) - 1;

function staticFigure(place) {
  const index = Number(place.dataset.figure);
  const own = options[index];
  let figure = figures[index];
  if (figure.layout.meta.kind !== "curves") return { data: figure.data, layout: figure.layout };
  const number = phaseOf(place);
  figure = figures[explored.phases[number].curves[chosenCurve[number]].figure];
  const axis = own.axis || figure.layout.meta.axis;
  const data = curveTraces(figure, number, { ...own, axis });
  const yaxis = { ...figure.layout.yaxis, ...yRange(figure.layout.meta.focus, data, own) };
  const xaxis = { ...figure.layout.xaxis, ...(axis === "flops" ? { tickformat: ".1e" } : {}) };
  const names = data.filter((trace) => trace.showlegend).length;
  return { data, layout: { ...figure.layout, xaxis, yaxis, meta: { ...figure.layout.meta, names, view: [chosenCurve[number], axis, own.log, own.whole] } } };
}

function layoutOf(own, width) {
  const narrow = width < 560;
  const axis = { color: "var(--soft)", gridcolor: "var(--line)", zerolinecolor: "var(--baseline)", zeroline: false };
  const base = {
    paper_bgcolor: "var(--paper)", plot_bgcolor: "var(--paper)", dragmode: narrow ? false : "zoom",
    font: { color: "var(--ink)", size: narrow ? 11 : 13, family: getComputedStyle(document.body).fontFamily },
    hoverlabel: { bgcolor: "var(--raised)", bordercolor: "var(--faint)", font: { color: "var(--ink)" }, align: "left", namelength: -1 },
  };
  const layout = { ...base, ...own, xaxis: { ...axis, ...own.xaxis }, yaxis: { ...axis, ...own.yaxis } };
  if (own.meta.names) layout.height += 22 * Math.ceil((own.meta.names * 230) / width);  // rows of the legend
  if (own.meta.kind === "effect" && narrow) layout.yaxis.ticktext = own.meta.short;
  return resolveColors(layout, "");
}

const builders = new Map();  // place -> what draws there
const drawn = new Set();

async function draw(place, width) {
  if (!(await plotlyReady) || !place.isConnected) return;
  const figure = builders.get(place)();
  const room = width || place.clientWidth;
  const layout = layoutOf(figure.layout, room);
  if (width) Object.assign(layout, { width });
  const data = resolveColors(figure.data, "");
  if (figure.layout.meta.kind === "speed" && room < 560) {
    for (const trace of data) trace.text = trace.customdata.map((rank) => ` ${rank} `);
  }
  drawn.add(place);
  applyZoom(place, layout, JSON.stringify([figure.layout.meta.kind, figure.layout.meta.view, layout.yaxis.ticktext]));
  const buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
  await Plotly.react(place, data, layout, { displaylogo: false, responsive: true, displayModeBar: room < 560 ? false : "hover", modeBarButtons: buttons });
  place.drawAgain = () => redraw(place);  // by these scripts, which new data of a served page replace
  if (!place.watchesZoom) {
    place.watchesZoom = true;
    place.on("plotly_relayout", (changes) => noteZoom(place, changes));
  }
}

// The ranges that a reader has zoomed to stay when a plot is redrawn, as for new data of a served page, until the axes
// mean something else, or a double click resets them.
function applyZoom(place, layout, view) {
  if (place.zoom && place.zoom.view !== view) place.zoom = null;
  place.view = view;
  for (const [axis, range] of Object.entries(place.zoom ? place.zoom.ranges : {})) layout[axis] = { ...layout[axis], range, autorange: false };
}

function noteZoom(place, changes) {
  const ranges = { ...(place.zoom && place.zoom.ranges) };
  let isReset = false;
  for (const axis of ["xaxis", "yaxis"]) {
    if (!Object.keys(changes).some((name) => name.startsWith(`${axis}.`))) continue;
    const { range, _rangeInitial0: low, _rangeInitial1: high } = place._fullLayout[axis];
    const isInitial = changes[`${axis}.autorange`] === true || (range[0] === low && range[1] === high);
    if (isInitial) delete ranges[axis]; else ranges[axis] = [...range];
    isReset = isReset || isInitial;
  }
  place.zoom = Object.keys(ranges).length ? { view: place.view, ranges } : null;
  if (isReset) place.drawAgain();  // the first ranges are those of older data
}

// Plots are drawn when they come near the screen; before printing, all of them are drawn.
const near = new IntersectionObserver((entries) => entries.forEach((entry) => {
  if (entry.isIntersecting) { near.unobserve(entry.target); redraw(entry.target); }
}), { rootMargin: "1200px" });

life.signal.addEventListener("abort", () => near.disconnect());

function show(place, build) {
  builders.set(place, build);
  near.observe(place);
}

let queue = Promise.resolve();  // two redraws of one plot must not overlap
function redraw(place, width) {
  place.setAttribute("aria-busy", "true");
  queue = queue.then(() => draw(place, width)).catch((error) => console.error(error)).finally(() => place.removeAttribute("aria-busy"));
  return queue;
}

function redrawAll(width) {
  for (const place of builders.keys()) {
    if (!place.isConnected) { builders.delete(place); drawn.delete(place); } else if (width || drawn.has(place)) redraw(place, width);
  }
}

document.querySelectorAll(".plot[data-figure]").forEach((place) => show(place, () => staticFigure(place)));

document.querySelectorAll("[data-toggle]").forEach((button) => button.addEventListener("click", () => {
  const own = options[Number(button.dataset.for)];
  own[button.dataset.toggle] = !own[button.dataset.toggle];
  button.setAttribute("aria-pressed", String(own[button.dataset.toggle]));
  redraw(document.querySelector(`[data-figure="${button.dataset.for}"]`));
}));

document.querySelectorAll("[data-option]").forEach((control) => control.addEventListener("input", () => {
  const index = Number(control.dataset.for);
  const { option } = control.dataset;
  options[index][option] = option === "smoothing" ? Number(control.value) : control.value;
  if (option === "axis") document.querySelector(`[data-over="${index}"]`).textContent = AXES[control.value];
  redraw(document.querySelector(`[data-figure="${index}"]`));
}));

const themeButton = document.getElementById("theme");
function nameTheme() { themeButton.textContent = `theme: ${document.documentElement.dataset.theme || "system"}`; }
themeButton.hidden = false;
nameTheme();
themeButton.addEventListener("click", () => {
  const order = ["system", "light", "dark"];
  const next = order[(order.indexOf(document.documentElement.dataset.theme || "system") + 1) % 3];
  if (next === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  try { localStorage.setItem("report-theme", next); } catch { /* storage is forbidden: the choice holds for this visit */ }
  nameTheme();
  redrawAll();
});
dark.addEventListener("change", () => redrawAll(), { signal: life.signal });
