"use strict";
const records = JSON.parse(document.getElementById("data").textContent);

// Sorting: numbers by size, gaps always last.
for (const table of document.querySelectorAll("table.sortable")) {
  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const heading = button.closest("th");
    const upwards = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", upwards ? "ascending" : "descending");
    const value = (row) => row.cells[heading.cellIndex].dataset.sort;
    const numeric = [...table.tBodies[0].rows].every((row) => value(row) === "" || !isNaN(value(row)));
    const sorted = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = numeric ? x - y : x.localeCompare(y);
      return upwards ? order : -order;
    });
    table.tBodies[0].append(...sorted);
  });
}

// Details of a row's runs.
const dialog = document.getElementById("dialog");
function list(title, entries) {
  const names = Object.entries(entries).filter(([, value]) => value !== null && value !== undefined);
  if (!names.length) return [];
  const heading = document.createElement("h4");
  heading.textContent = title;
  const terms = document.createElement("dl");
  for (const [name, value] of names) {
    const term = document.createElement("dt");
    const text = document.createElement("dd");
    term.textContent = name;
    text.textContent = typeof value === "object" ? JSON.stringify(value) : String(value);
    terms.append(term, text);
  }
  return [heading, terms];
}
document.addEventListener("click", (event) => {
  const button = event.target.closest("button.details");
  if (!button) return;
  document.getElementById("dialog-title").textContent = button.dataset.title;
  const body = document.getElementById("dialog-body");
  body.replaceChildren();
  for (const key of button.dataset.keys.split(" ")) {
    const record = records[key];
    const heading = document.createElement("h3");
    heading.textContent = `${record.kind} ${key}`;
    body.append(heading, ...list("Result", record.result), ...list("Settings that are not the default", record.config),
      ...list("Provenance", record.provenance));
  }
  dialog.showModal();
  dialog.scrollTop = 0;
});
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});

// The list of records.
const filter = document.getElementById("filter");
filter.addEventListener("input", () => {
  const wanted = filter.value.toLowerCase();
  for (const row of document.querySelectorAll("#all-records tbody tr"))
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
  document.getElementById("shown").textContent =
    `${document.querySelectorAll("#all-records tbody tr:not([hidden])").length} shown`;
});
