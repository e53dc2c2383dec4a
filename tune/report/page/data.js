"use strict";
// None of these scripts contains template variables: their hash is part of the Content-Security-Policy of the page.
// This one reads the data, and has what the others share.
const life = new AbortController();  // ends when a served page has new data and runs these scripts again
document.addEventListener("pageleave", () => life.abort(), { once: true });
const parsed = (id) => JSON.parse(document.getElementById(id).textContent);
const figures = parsed("figures");
const explored = parsed("explored");
const MISSING = "–", MINUS = "−";

// Creates an element. Text becomes text nodes, so nothing that a file says is read as markup.
function make(tag, attributes, ...children) {
  const inSvg = ["svg", "path", "line", "text", "title"].includes(tag);
  const element = inSvg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  restoreRole(element);
  return element;
}

// On a narrow screen rows are cards, and their layout would take what a table means from screen readers.
function restoreRole(element) {
  const roles = { TABLE: "table", THEAD: "rowgroup", TBODY: "rowgroup", TR: "row", TD: "cell", TH: element.scope === "row" ? "rowheader" : "columnheader" };
  if (roles[element.tagName]) element.setAttribute("role", roles[element.tagName]);
}
document.querySelectorAll("table, thead, tbody, tr, td, th").forEach(restoreRole);

const minus = (text) => text.replace("-", MINUS);

function number(value, decimals = 4) {
  if (value === null || value === undefined) return MISSING;
  const text = value.toFixed(decimals);
  return Number(text) ? minus(text) : text.replace("-", "");
}

const signed = (value) => (Number(value.toFixed(4)) > 0 ? "+" : "") + number(value);

// As `fmt.count` in Python: three significant digits and a unit.
function count(value) {
  if (value === null || value === undefined) return MISSING;
  const units = ["", "k", "M", "B", "T"];
  let unit = 0;
  for (; Math.abs(value) >= 999.5 && unit < 4; unit += 1) value /= 1000;
  const decimals = !unit || Math.abs(value) >= 99.95 ? 0 : Math.abs(value) >= 9.995 ? 1 : 2;
  return minus(value.toFixed(decimals)) + units[unit];
}

const small = (value) => minus(Number(value.toPrecision(4)).toString());

// A metric: losses with four decimals, whole and large numbers as counts, others with four digits.
function metricText(value) {
  if (value === null || value === undefined) return MISSING;
  if (Number.isInteger(value) && Math.abs(value) < 1000) return minus(String(value));
  const size = Math.abs(value);
  return size >= 1000 ? count(value) : size >= 0.01 ? number(value) : small(value);
}

const pText = (p) => p === null ? MISSING : p < 0.001 ? "<0.001" : p.toFixed(p < 0.1 ? 3 : 2);

// Says in what order texts stand: numbers by size, before words.
function compareTexts(one, other) {
  const [a, b] = [Number(one), Number(other)];
  if (!Number.isNaN(a) && !Number.isNaN(b) && one !== "" && other !== "") return a - b;
  return Number.isNaN(a) - Number.isNaN(b) || String(one).localeCompare(String(other), "en");
}

const slug = (verdict) => verdict.replace(" ", "-");
const chip = (verdict) => make("span", { class: `chip ${slug(verdict)}` }, verdict);

// Plotly is compressed on the page. A script element whose text has the hash in the policy may run.
const plotlyReady = (async () => {
  if (typeof Plotly !== "undefined") return true;  // a served page loads it from its server
  const packed = document.getElementById("plotly");
  if (!packed) return false;
  if (typeof DecompressionStream === "undefined") {
    document.querySelectorAll(".plot").forEach((place) => place.replaceChildren("This browser is too old for the figures; the tables have the numbers."));
    return false;
  }
  await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));  // the text is painted first
  const text = atob(packed.textContent);
  const bytes = Uint8Array.from({ length: text.length }, (_, i) => text.charCodeAt(i));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  packed.remove();
  return true;
})();
