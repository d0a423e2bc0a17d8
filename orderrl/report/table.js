// Sortable tables. A click on a header sorts by its column, best first; the next one turns the order round.
// Cells without a value stay at the end. One header at a time is a tab stop, and arrow keys move it. Columns that are
// not main ones are shown on demand; without this script all are.
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

  const buttons = [...headers].map((header) => header.querySelector("button"));
  const stop = (chosen) => buttons.forEach((button) => { button.tabIndex = button === chosen ? 0 : -1; });
  stop(buttons[0]);
  table.tHead.addEventListener("keydown", (event) => {
    const shown = buttons.filter((button) => button.offsetParent !== null);
    const place = shown.indexOf(document.activeElement) + { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!shown[place]) return;
    event.preventDefault();
    stop(shown[place]);
    shown[place].focus();
  });

  const choice = table.closest("details")?.querySelector('[data-part="more"]');
  if (choice) {
    const groups = [...table.tHead.rows[0].cells].map((group) => [group, group.colSpan]);
    const all = choice.querySelector("input");
    const show = () => {
      table.classList.toggle("main", !all.checked);
      let column = 0;
      for (const [group, width] of groups) {
        const members = [...headers].slice(column, (column += width));
        group.colSpan = Math.max(1, members.filter((header) => all.checked || !header.classList.contains("more")).length);
      }
      stop(buttons[0]);
    };
    choice.hidden = false;
    all.addEventListener("change", show);
    show();
  }
}
