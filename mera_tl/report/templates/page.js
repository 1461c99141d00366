const figures = JSON.parse(document.getElementById("figures").textContent);
const root = document.documentElement;
const problem = text => { root.dataset.problems = (root.dataset.problems || "") + text + "; "; };
window.addEventListener("error", event => problem(event.message));
window.addEventListener("unhandledrejection", event => problem(String(event.reason)));

// --- figures: those in sight at once, those in a fold when it is opened --------------------------
const config = { responsive: true, displaylogo: false,
  displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
  modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };
const draw = place => {
  if (place.dataset.drawn || place.closest("details:not([open]), [hidden]")) return Promise.resolve();
  place.dataset.drawn = "soon";
  const { data, layout } = figures[place.id];
  return Plotly.newPlot(place, data, layout, config)
    .then(() => { place.dataset.drawn = "yes"; place.dispatchEvent(new Event("drawn")); })
    .catch(error => { problem(error.message); place.textContent = "Not drawn: " + error; });
};
const drawAll = within => {
  const places = [...within.querySelectorAll(".plot")];
  // One at a time, so that the page answers meanwhile.
  const next = () => { const place = places.shift(); if (place) draw(place).then(() => setTimeout(next)); };
  next();
};
for (const fold of document.querySelectorAll("details"))
  fold.addEventListener("toggle", () => { if (fold.open) drawAll(fold); });
const unfold = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let fold = target && target.closest("details"); fold; fold = fold.parentElement.closest("details"))
    fold.open = true;
  if (target) target.scrollIntoView();
};
window.addEventListener("hashchange", unfold);

// --- a threshold to move --------------------------------------------------------------------------
for (const box of document.querySelectorAll("[data-slider]")) {
  const told = JSON.parse(box.dataset.slider), input = box.querySelector("input");
  const show = () => {
    const i = Number(input.value);
    box.querySelector(".at").textContent = told.labels[i];
    box.querySelector(".says").textContent = told.says[i];
    for (const [name, [x, y]] of Object.entries(told.marks[i])) {
      const place = document.getElementById(name);
      if (!place || place.dataset.drawn !== "yes") continue;
      const line = { type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1,
        line: { color: "#D55E00", width: 2 } };
      const ring = { x, y, xref: "x", yref: "y", text: "threshold " + told.labels[i], arrowhead: 6,
        ax: 50, ay: 30, arrowcolor: "#D55E00", bgcolor: "rgba(128,128,128,.15)" };
      const { shapes = [], annotations = [] } = figures[name].layout;
      Plotly.relayout(place, y === null ? { shapes: [...shapes, line] }
        : { annotations: [...annotations, ring] });
    }
  };
  input.addEventListener("input", show);
  show();
}

// --- one layer at a time ---------------------------------------------------------------------------
for (const choice of document.querySelectorAll("select.layer"))
  choice.addEventListener("change", () => {
    const box = choice.closest("p").nextElementSibling;
    for (const each of box.children) each.hidden = each.firstElementChild.id !== choice.value;
    drawAll(box);
  });

// --- tables are sorted by a click on a heading -----------------------------------------------------
for (const table of document.querySelectorAll("table.sortable"))
  table.querySelectorAll("th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const value = row => { const text = row.children[column].textContent; return isNaN(parseFloat(text)) ? text : parseFloat(text); };
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        return way * (typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === "number" ? -1 : 1);
      });
      table.tBodies[0].append(...rows);
      for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
    });
  });

// --- example by example -----------------------------------------------------------------------------
const make = (tag, text, kind) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  return element;
};
const COLUMNS = [["row", "row"], ["true", "label"], ["before", "before"], ["after", "after"],
  ["error", "error_before"], ["then", "error_after"]];
const KINDS = { changed: row => row.change === "0->1" || row.change === "1->0",
  recovered: row => row.change === "0->1", regressed: row => row.change === "1->0",
  "still wrong": row => row.change === "0->0", "still right": row => row.change === "1->1",
  all: () => true };
// Layer by layer, the error that the probe predicts at the final prompt token, where it was fitted.
const strip = layers => {
  if (!layers.length) return [];
  const line = make("div", undefined, "strip");
  for (const [layer, before, after] of layers) {
    const box = make("div", undefined, after < before - 1e-4 ? "moved" : "");
    box.append(make("small", "layer " + layer), make("span", before.toFixed(2) + " → " + after.toFixed(2)));
    box.style.setProperty("--error", before);
    line.append(box);
  }
  return [make("p", "Predicted error at the final prompt token, as it enters and leaves each steered layer:", "soft"), line];
};
const explore = box => {
  const { options, rows } = JSON.parse(document.getElementById(box.dataset.rows).textContent);
  const [kind, words, body] = [".kind", ".words", "tbody"].map(name => box.querySelector(name));
  const detail = box.querySelector(".detail");
  let order = ["row", 1], chosen = null;
  for (const [name, is] of Object.entries(KINDS)) {
    const n = rows.filter(is).length, choice = make("option", `${name} (${n})`);
    choice.value = name;
    if (n) kind.append(choice);
  }
  const choose = (row, line) => {
    chosen = row.row;
    for (const each of body.children) each.setAttribute("aria-selected", each === line);
    const verdict = { "0->1": ["recovered", "better"], "1->0": ["regressed", "worse"],
      "0->0": ["still wrong", ""], "1->1": ["still right", ""] }[row.change];
    const head = make("p", `Row ${row.row}: `);
    head.append(make("b", verdict[0], verdict[1]),
      `, true answer ${row.label}; ${row.before ?? "nothing"} became ${row.after ?? "nothing"}`);
    const bars = options.map((option, i) => {
      const line = make("div", undefined, "option"), pair = make("div");
      for (const [probs, when] of [[row.p_before, "before"], [row.p_after, "after"]]) {
        const bar = make("div", undefined, "bar"), part = make("i", undefined, when);
        part.style.width = `${100 * probs[i]}%`;
        bar.title = `${when}: ${probs[i].toFixed(2)}`;
        bar.append(part); pair.append(bar);
      }
      line.append(make("b", option + (option === row.label ? " ✓" : "")), pair,
        make("span", row.p_after[i].toFixed(2)));
      line.setAttribute("aria-label",
        `${option}: ${row.p_before[i].toFixed(2)} before, ${row.p_after[i].toFixed(2)} after`);
      return line;
    });
    detail.replaceChildren(head, ...bars, make("p", "grey: unsteered, blue: steered", "soft"),
      ...strip(row.predicted || []),
      ...(row.reply ? [make("p", `Reply: ${row.reply}`)] : []), make("pre", row.prompt));
  };
  const list = () => {
    const text = words.value.toLowerCase(), [by, way] = order;
    const shown = rows.filter(row => KINDS[kind.value](row) && row.prompt.toLowerCase().includes(text));
    shown.sort((a, b) => way * (a[by] < b[by] ? -1 : a[by] > b[by] ? 1 : 0));
    body.replaceChildren(...shown.slice(0, 500).map(row => {
      const line = make("tr");
      for (const [, name] of COLUMNS) {
        const value = row[name], number = name.startsWith("error");
        line.append(make("td", number ? value.toFixed(2) : value ?? "nothing",
          typeof value === "number" ? "" : "text"));
      }
      line.tabIndex = 0;
      line.setAttribute("aria-selected", row.row === chosen);
      line.addEventListener("click", () => choose(row, line));
      line.addEventListener("keydown", event => { if (event.key === "Enter") choose(row, line); });
      return line;
    }));
    box.querySelector(".shown").textContent = `${shown.length} of ${rows.length}`;
  };
  const heads = COLUMNS.map(([title, name]) => {
    const cell = make("th", undefined, ["label", "before", "after"].includes(name) ? "text" : "");
    const button = make("button", title);
    button.type = "button";
    button.addEventListener("click", () => {
      order = [name, order[0] === name ? -order[1] : 1];
      for (const head of heads) head.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", order[1] > 0 ? "ascending" : "descending");
      list();
    });
    cell.append(button);
    return cell;
  });
  box.querySelector("thead tr").append(...heads);
  const points = document.getElementById(box.dataset.points);
  if (points) points.addEventListener("drawn", () => points.on("plotly_click", event => {
    const row = rows.find(each => each.row === event.points[0].customdata);
    if (!row) return;
    kind.value = "all"; words.value = "";
    list();
    const line = [...body.children].find(each => each.firstChild.textContent === String(row.row));
    choose(row, line);
    line.scrollIntoView({ block: "nearest" });
    box.scrollIntoView();
  }));
  kind.addEventListener("change", list);
  words.addEventListener("input", list);
  list();
  if (body.firstChild) body.firstChild.click();
};
document.querySelectorAll(".explorer").forEach(explore);

for (const button of document.querySelectorAll(".copy"))
  button.addEventListener("click", () => {
    getSelection().selectAllChildren(button.parentElement.querySelector("pre"));
    button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
  });

unfold();
drawAll(document);
