"use strict";
// Sorts the table of campaigns, and keeps it sorted when the page changes.
(() => {
  let sorted = null;  // [column, direction] once the reader has chosen

  // On a narrow screen rows are cards, and their layout would take what a table means from screen readers.
  function restoreRoles() {
    const roles = { TABLE: "table", THEAD: "rowgroup", TBODY: "rowgroup", TR: "row", TD: "cell", TH: "columnheader" };
    document.querySelectorAll("table, thead, tbody, tr, td, th").forEach((element) => element.setAttribute("role", roles[element.tagName]));
  }

  function value(row, column) {
    const text = row.dataset[column] || "";
    return text === "" || Number.isNaN(Number(text)) ? text : Number(text);
  }

  function compare(a, b) {
    if (a === "" || b === "") return (a === "") - (b === "");  // what is unknown comes last, in both directions
    const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
    return sorted[1] === "ascending" ? order : -order;
  }

  function sort() {
    const table = document.getElementById("campaigns");
    if (!table || !sorted) return;
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => compare(value(a, sorted[0]), value(b, sorted[0])));
    table.tBodies[0].append(...rows);
    for (const head of table.tHead.rows[0].cells) {
      const button = head.querySelector("button");
      if (button.dataset.sort === sorted[0]) head.setAttribute("aria-sort", sorted[1]);
      else head.removeAttribute("aria-sort");
    }
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-sort]");
    if (!button) return;
    const column = button.dataset.sort, first = button.dataset.first;
    const other = first === "ascending" ? "descending" : "ascending";
    sorted = [column, sorted && sorted[0] === column && sorted[1] === first ? other : first];
    sort();
  });
  document.addEventListener("pagechange", () => { restoreRoles(); sort(); });
  restoreRoles();
})();
