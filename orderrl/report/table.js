// Sortable tables. A click on a header sorts by its column, best first; the next one turns the order round.
// Cells without a value stay at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows].at(-1).cells;

  function compare(one, other, numeric) {
    return numeric ? Number(one) - Number(other) : one.localeCompare(other, "en", { numeric: true });
  }

  function sort(column, direction) {
    const numeric = !headers[column].classList.contains("text");
    const sign = direction === "ascending" ? 1 : -1;
    const value = (row) => row.cells[column].dataset.sort;
    const rows = [...table.tBodies[0].rows];
    const known = rows.filter((row) => value(row) !== "");
    known.sort((a, b) => sign * compare(value(a), value(b), numeric));
    table.tBodies[0].append(...known, ...rows.filter((row) => value(row) === ""));
  }

  [...headers].forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const turned = header.ariaSort === "ascending" ? "descending" : "ascending";
      const direction = header.ariaSort ? turned : header.dataset.order;
      for (const other of headers) other.ariaSort = null;
      header.ariaSort = direction;
      sort(column, direction);
    });
  });
}
