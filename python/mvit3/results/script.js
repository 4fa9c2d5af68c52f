"use strict";
(() => {
  const root = document.documentElement, toggle = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const kept = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
  const show = (theme) => {
    root.dataset.theme = theme;
    toggle.textContent = theme === "dark" ? "Light" : "Dark";
    toggle.setAttribute("aria-pressed", String(theme === "dark"));
  };
  const current = () => kept() || (system.matches ? "dark" : "light");
  show(current());
  system.addEventListener("change", () => show(current()));
  toggle.addEventListener("click", () => {
    const theme = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("theme", theme); } catch { /* a file may keep nothing */ }
    show(theme);
  });

  const table = document.getElementById("all"), body = table.tBodies[0], rows = [...body.rows];
  const words = document.getElementById("words"), count = document.getElementById("count");
  const chosen = ["kind", "work", "whose"].map((id) => document.getElementById(id));
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const filter = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const [kind, work, whose] = chosen.map((one) => one.value);
    let shown = 0;
    rows.forEach((row, i) => {
      const fits = (!kind || row.dataset.kind === kind) && (!work || row.dataset.work === work) &&
        (!whose || row.dataset.whose === whose) && wanted.every((word) => texts[i].includes(word));
      row.hidden = !fits;
      shown += fits;
    });
    count.textContent = `${shown} of ${rows.length} row${rows.length === 1 ? "" : "s"}`;
  };
  words.addEventListener("input", filter);
  words.form.addEventListener("submit", (event) => event.preventDefault());
  chosen.forEach((one) => one.addEventListener("change", filter));

  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.classList.contains("n") ? (cell.dataset.v === undefined ? NaN : Number(cell.dataset.v)) : cell.textContent;
  };
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const order = [...rows].sort((a, b) => {
      const x = value(a, column), y = value(b, column);
      if (typeof x === "string") return (up ? 1 : -1) * x.localeCompare(y, "en", { numeric: true });
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // no number: last
      return (up ? 1 : -1) * (x - y);
    });
    body.append(...order);
  }));
})();
