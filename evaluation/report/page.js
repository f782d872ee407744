"use strict";
for (const slider of document.querySelectorAll(".slider")) {
  const range = slider.querySelector("input");
  const move = () => slider.style.setProperty("--cut", `${range.value}%`);
  range.addEventListener("input", move);
  move();
}
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column];
    const compare = (one, other) => {
      const [a, b] = [key(one), key(other)];
      const [x, y] = [parseFloat(a.dataset.number), parseFloat(b.dataset.number)];
      if (Number.isNaN(x) && Number.isNaN(y)) return a.textContent.localeCompare(b.textContent, undefined, {numeric: true});
      // What has no number comes last, whichever way.
      if (Number.isNaN(x)) return down ? -1 : 1;
      if (Number.isNaN(y)) return down ? 1 : -1;
      return x - y;
    };
    const rows = [...table.tBodies[0].rows].sort(compare);
    if (down) rows.reverse();
    table.tBodies[0].append(...rows);
  }));
}
// On paper nothing can be opened.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open])")) {
    details.open = true;
    details.dataset.closed = "";
  }
});
addEventListener("afterprint", () => {
  for (const details of document.querySelectorAll("details[data-closed]")) {
    details.open = false;
    delete details.dataset.closed;
  }
});
