"use strict";
// Keeps a served page up to date. It asks the server for the newest version; if that is another one, it puts the new
// content into the page, runs the script of the page again, and brings back what the reader had opened, chosen and
// scrolled to. The script hears "pageleave" before that, and other scripts hear "pagechange" after it.
(() => {
  const live = document.getElementById("live");
  const main = document.querySelector("main");
  const OWN_SCRIPT = "body > script:not([src]):not([type])";  // of the report
  const RUNNING = 2000, ENDED = 15000, LONGEST = 30000;  // milliseconds between two questions
  let version = live.dataset.version, etag = "", failures = 0, timer = 0, isAsking = false, isHeld = false;
  let isChanging = true, known = new Date();

  // ---- the line at the top ----

  function part(tag, name, text) {
    const made = document.createElement(tag);
    made.className = name;
    made.textContent = text;
    return made;
  }

  function show(word, texts, look = "") {
    const nodes = [part("span", "state", word), ...texts.map((text) => part("span", "", text))];
    if (live.dataset.home) {
      const link = part("a", "home", "all campaigns");
      link.href = live.dataset.home;
      nodes.unshift(link);
    }
    const line = document.createElement("div");
    line.append(...nodes);
    if (live.className === `live ${look}` && live.innerHTML === line.innerHTML) return;  // screen readers say changes
    live.className = `live ${look}`;
    live.replaceChildren(...nodes);
  }

  // ---- what the reader has done to the page ----

  // Calls visit(name, element) for elements that match, under names that their successors have, too.
  function eachNamed(selector, nameOf, visit) {
    const seen = new Map();
    for (const item of main.querySelectorAll(selector)) {
      const section = item.closest("section");
      const place = section ? section.id || (section.querySelector("h2") || {}).textContent || section.className : "";
      const name = `${place} ${item.tagName} ${nameOf(item)}`;
      seen.set(name, (seen.get(name) || 0) + 1);
      visit(`${name} ${seen.get(name)}`, item);
    }
  }

  const controlName = (item) => item.name || item.dataset.option || item.id;
  const buttonName = (item) => item.getAttribute("aria-label") || item.dataset.toggle || item.textContent;
  const plotName = (item) => item.getAttribute("aria-label") || item.dataset.kind || "";
  const headingName = (item) => item.textContent;
  const position = () => "";
  const chosen = (item) => item.tagName === "SELECT" ? (item.selectedOptions[0] || {}).text : item.type === "checkbox" ? item.checked : item.value;

  function choose(item, value) {
    if (chosen(item) === value) return;
    if (item.tagName === "SELECT") {
      const option = [...item.options].find(({ text }) => text === value);
      if (!option) return;
      item.value = option.value;
    } else if (item.type === "checkbox") item.checked = value;
    else item.value = value;
    item.dispatchEvent(new Event("input", { bubbles: true }));
  }

  function remember() {
    const memory = { controls: new Map(), pressed: new Set(), expanded: new Set(), details: new Map(), scrolled: new Map(), focus: null, anchor: null, rows: 0 };
    eachNamed("input, select", controlName, (name, item) => memory.controls.set(name, chosen(item)));
    eachNamed("button[aria-pressed=true]", buttonName, (name) => memory.pressed.add(name));
    eachNamed("button[aria-expanded=true]", buttonName, (name) => memory.expanded.add(name));
    eachNamed("details", (item) => item.querySelector("summary").textContent, (name, item) => memory.details.set(name, item.open));
    eachNamed(".scroll", position, (name, item) => memory.scrolled.set(name, [item.scrollLeft, item.scrollTop]));
    eachNamed("input, select", controlName, (name, item) => { if (item === document.activeElement) memory.focus = [name, item.selectionStart, item.selectionEnd]; });
    eachNamed("button, a, summary", buttonName, (name, item) => { if (item === document.activeElement) memory.focus = [name]; });
    eachNamed("h1, h2, h3, h4, caption, tr", headingName, (name, item) => {
      const { bottom, top, height } = item.getBoundingClientRect();
      if (!memory.anchor && height > 0 && bottom > 0 && scrollY > 0) memory.anchor = [name, top];
    });
    memory.rows = main.querySelectorAll("#trial-table tbody tr").length;
    return memory;
  }

  function recall(memory) {
    const pick = (name, item) => { if (memory.controls.has(name)) choose(item, memory.controls.get(name)); };
    eachNamed("input, select", controlName, pick);
    const more = document.getElementById("more-trials");
    while (more && !more.hidden && main.querySelectorAll("#trial-table tbody tr").length < memory.rows) more.click();
    // Clicks add and remove elements, so all names are found before the first one.
    const clicks = [];
    eachNamed("button[aria-expanded=false]", buttonName, (name, item) => { if (memory.expanded.has(name)) clicks.push(item); });
    eachNamed("button[aria-pressed=false]", buttonName, (name, item) => { if (memory.pressed.has(name)) clicks.push(item); });
    clicks.forEach((item) => item.click());
    eachNamed("input, select", controlName, pick);  // also in what was opened by these clicks
    eachNamed("details", (item) => item.querySelector("summary").textContent, (name, item) => { if (memory.details.has(name)) item.open = memory.details.get(name); });
    eachNamed(".scroll", position, (name, item) => { if (memory.scrolled.has(name)) [item.scrollLeft, item.scrollTop] = memory.scrolled.get(name); });
    const [focused, start, end] = memory.focus || [];
    if (focused) eachNamed("input, select", controlName, (name, item) => {
      if (name !== focused) return;
      item.focus({ preventScroll: true });
      if (typeof start === "number") item.setSelectionRange(start, end);
    });
    if (focused) eachNamed("button, a, summary", buttonName, (name, item) => { if (name === focused) item.focus({ preventScroll: true }); });
    let isPlaced = !memory.anchor;
    eachNamed("h1, h2, h3, h4, caption, tr", headingName, (name, item) => {
      if (isPlaced || name !== memory.anchor[0]) return;
      isPlaced = true;
      scrollBy({ top: item.getBoundingClientRect().top - memory.anchor[1], behavior: "instant" });
    });
  }

  // A plot that was drawn takes the place of its successor, so that it is redrawn without a flash.
  function keepPlots(plots) {
    eachNamed(".plot", plotName, (name, item) => {
      const old = plots.get(name);
      if (!old) return;
      plots.delete(name);
      for (const { name: attribute } of [...old.attributes]) if (attribute !== "class" && attribute !== "style") old.removeAttribute(attribute);
      for (const { name: attribute, value } of [...item.attributes]) if (attribute !== "class") old.setAttribute(attribute, value);
      item.replaceWith(old);
    });
    for (const old of plots.values()) Plotly.purge(old);
  }

  function replace(fresh) {
    const memory = remember(), plots = new Map(), zooms = new Map();
    eachNamed(".plot", plotName, (name, item) => {
      if (item.classList.contains("js-plotly-plot")) plots.set(name, item);
      if (item.zoom) zooms.set(name, item.zoom);
    });
    document.dispatchEvent(new CustomEvent("pageleave"));
    const next = document.importNode(fresh.querySelector("main"), true);
    version = next.querySelector("#live").dataset.version;
    next.querySelector("#live").remove();
    [...main.children].forEach((item) => { if (item !== live) item.remove(); });
    main.append(...next.childNodes);
    keepPlots(plots);
    for (const item of fresh.querySelectorAll('script[type="application/json"]')) {
      const old = document.getElementById(item.id);
      if (old) old.textContent = item.textContent;
    }
    document.title = fresh.title;
    const script = document.querySelector(OWN_SCRIPT);
    if (script) {
      const again = document.createElement("script");  // runs at once; its hash is in the policy of the page
      again.textContent = script.textContent;
      script.replaceWith(again);
    }
    document.dispatchEvent(new CustomEvent("pagechange"));
    recall(memory);
    eachNamed(".plot", plotName, (name, item) => { if (!item.zoom && zooms.has(name)) item.zoom = zooms.get(name); });
  }

  // ---- asking the server ----

  const isBusy = () => isHeld || !getSelection().isCollapsed;  // the reader drags something, or selects text

  class Gone extends Error {}

  async function get(address, headers, seconds) {
    const answer = await fetch(address, { headers, cache: "no-store", signal: AbortSignal.timeout(1000 * seconds) });
    if (answer.status === 404) throw new Gone();
    if (!answer.ok && answer.status !== 304) throw new Error(`status ${answer.status}`);
    return answer;
  }

  async function ask() {
    const answer = await get(live.dataset.poll, etag ? { "If-None-Match": etag } : {}, 60);
    if (answer.status === 304) return;
    const news = await answer.json();
    if (news.version !== version && !isBusy()) {
      const page = await get(location.pathname, {}, 120);
      const fresh = new DOMParser().parseFromString(await page.text(), "text/html");
      if (!fresh.querySelector(OWN_SCRIPT) === !document.querySelector(OWN_SCRIPT)) replace(fresh);
      else location.reload();  // the campaign can be read again, or can be read no more
    }
    etag = news.version === version ? answer.headers.get("ETag") : "";
    isChanging = news.changing;
    show(news.state, news.parts, isChanging ? "running" : "");
  }

  async function poll() {
    clearTimeout(timer);
    if (isAsking || document.hidden) return;
    isAsking = true;
    try {
      if (failures) etag = "";  // the line about the lost connection goes
      await ask();
      [failures, known] = [0, new Date()];
    } catch (error) {
      failures += 1;
      if (error instanceof Gone) show("gone", ["the folder of this campaign is not there any more"], "lost");
      else show("connection lost", [`as of ${known.toLocaleTimeString()}; trying again`], "lost");
      if (!(error instanceof Gone || error instanceof TypeError || error.name === "TimeoutError")) console.error(error);
    }
    isAsking = false;
    const pause = isChanging ? RUNNING : ENDED;
    timer = setTimeout(poll, failures ? Math.min(LONGEST, 1000 * 2 ** failures) : pause);
  }

  addEventListener("pointerdown", () => { isHeld = true; });
  for (const name of ["pointerup", "pointercancel", "blur"]) addEventListener(name, () => { isHeld = false; });
  document.addEventListener("visibilitychange", poll);
  addEventListener("pageshow", poll);  // also when the page comes back from the browser's history
  addEventListener("pagehide", () => clearTimeout(timer));
})();
