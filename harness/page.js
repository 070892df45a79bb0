"use strict";
// Tables sort by a click on a heading (up, down, as written) and filter by words that a line must contain.
for (const sheet of document.querySelectorAll(".sheet")) {
  const body = sheet.querySelector("tbody");
  const heads = [...sheet.querySelectorAll("th")];
  const written = [...body.rows];
  const collator = new Intl.Collator("en", { numeric: true });

  const compare = (column, sign) => (first, second) => {
    const keys = [first, second].map((line) => line.cells[column].dataset.key);
    const words = [first, second].map((line) => line.cells[column].textContent);
    if (keys[0] !== undefined && keys[1] !== undefined && keys[0] !== keys[1]) {
      return sign * (Number(keys[0]) - Number(keys[1]));
    }
    if ((keys[0] === undefined) !== (keys[1] === undefined)) {
      return keys[0] === undefined ? 1 : -1; // what is no number comes last, either way
    }
    return sign * collator.compare(words[0], words[1]);
  };

  heads.forEach((head, column) => {
    head.firstElementChild.addEventListener("click", () => {
      const next = { ascending: "descending", descending: null }[head.getAttribute("aria-sort")];
      const order = next === undefined ? "ascending" : next;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (order !== null) head.setAttribute("aria-sort", order);
      const sorted = order === null
        ? written
        : [...written].sort(compare(column, order === "ascending" ? 1 : -1));
      body.append(...sorted);
    });
  });

  const form = sheet.querySelector(".filter");
  if (form === null) continue;
  form.hidden = false; // without a script it could do nothing
  const box = form.querySelector("input");
  const told = form.querySelector("output");
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const line of written) {
      const text = [...line.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
      line.hidden = !words.every((word) => text.includes(word));
      shown += line.hidden ? 0 : 1;
    }
    told.value = words.length ? `${shown} of ${written.length} lines` : "";
  });
}
