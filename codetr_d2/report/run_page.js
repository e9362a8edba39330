"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const { runs, classes, kinds, pictures } = data;
const isPair = runs.length === 2;
const background = classes.length; // the class that is none
const COLOURS = ["#4a7dff", "#f28e2b", "#2aa876", "#e5534b", "#a06be0", "#b3812f", "#e06fb4", "#1ba3bd", "#8b96a3", "#a5ad27"];
const DASHES = ["", "6 3", "2 3", "8 3 2 3"];
const RUN_COLOURS = ["#4a7dff", "#f28e2b"];
const FIRST_CARDS = 24;
const EXPLANATIONS = {
  class: "in the place of an object of another class",
  location: "the right class, but the box overlaps too little (IoU 0.1 to 0.5)",
  both: "overlaps a little with an object of another class",
  duplicate: "an object that a better detection has found already",
  background: "where there is no object",
  missed: "an object that no detection finds, nor means by an error of class or location",
};
const state = { task: "bbox", least: 1, class: -1, kind: "any", order: "worst", cards: FIRST_CARDS };
const $ = (id) => document.getElementById(id);
const binOf = (points) => Math.min(Math.floor(points / 100), 99);
const task = (run) => run.tasks[state.task] || run.tasks.bbox;
const taskName = (run) => (run.tasks[state.task] ? state.task : "bbox");
const has = (value) => value !== null && value !== undefined;
const show = (value, digits = 1) => (has(value) ? value.toFixed(digits) : "–");
const plural = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
const colourOf = (kind) => `var(--${kind})`;
const runNames = runs[0].name !== (runs[1] || {}).name ? runs.map((x) => x.name) : runs.map((x, i) => `${x.name} (${"AB"[i]})`);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "on") for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && has(value)) element.setAttribute(key, value);
  }
  element.append(...children.filter(has));
  return element;
}
function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) if (has(value)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// --- Tables -------------------------------------------------------------------------------------------------------
// columns: {key, name, title, text (left-aligned), show(row) -> text or element}; rows are objects.
function sortable(table, caption, columns, rows, options = {}) {
  const order = table.order || options.order || { key: null, down: true };
  table.order = order;
  const sorted = [...rows];
  if (order.key !== null) {
    sorted.sort((a, b) => {
      const [x, y] = [a[order.key], b[order.key]];
      if (!has(x) || !has(y)) return has(y) - has(x); // unknown ones last
      const compared = typeof x === "string" ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
      return order.down ? -compared : compared;
    });
  }
  const head = columns.map((column) => {
    const sort = order.key === column.key ? (order.down ? "descending" : "ascending") : "none";
    const choose = () => {
      order.down = order.key === column.key ? !order.down : !column.text;
      order.key = column.key;
      sortable(table, caption, columns, rows, options);
      table.querySelector(`[data-key="${column.key}"]`).focus();
    };
    const button = make("button", { type: "button", "data-key": column.key, title: column.title, on: { click: choose } }, column.name);
    return make("th", { scope: "col", "aria-sort": sort, class: column.text ? "text" : null }, button);
  });
  const body = [...sorted, ...(options.last || [])].map((row) => {
    const cells = columns.map((column, i) => {
      const content = column.show ? column.show(row) : column.text ? row[column.key] ?? "" : show(row[column.key]);
      return i === 0 ? make("th", { scope: "row" }, content) : make("td", { class: column.text ? "text" : null }, content);
    });
    return make("tr", { class: row.style }, ...cells);
  });
  table.replaceChildren(make("caption", {}, caption), make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body));
}
function difference(value, digits = 1) {
  if (!has(value)) return "–";
  const text = (value > 0 ? "+" : "") + value.toFixed(digits);
  return make("span", { class: value > 0 ? "up" : value < 0 ? "down" : null }, text);
}
const minus = (a, b) => (has(a) && has(b) ? a - b : null);

// --- Charts -------------------------------------------------------------------------------------------------------
const round = (value) => (value === 0 ? "0" : Math.abs(value) >= 1e4 || Math.abs(value) < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(3)));
function ticksOf(low, high, log) {
  if (log) {
    const [first, last] = [Math.floor(low), Math.ceil(high)];
    const step = Math.max(1, Math.ceil((last - first) / 5));
    const ticks = [];
    for (let power = first; power <= last; power += step) {
      for (const factor of high - low < 2 ? [1, 2, 5] : [1]) {
        const place = power + Math.log10(factor);
        if (place >= low - 1e-9 && place <= high + 1e-9) ticks.push(place);
      }
    }
    return ticks;
  }
  const raw = (high - low) / 4 || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((x) => x * power).find((x) => x >= raw * 0.999);
  const ticks = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) ticks.push(+value.toPrecision(10));
  return ticks;
}
// series: {name, x, y, colour, dash, width, opacity, keyless}
function chart({ title, x: xName, series, xRange, yRange, log, mark, keys = true }) {
  const [W, H, left, right, top, bottom] = [330, 195, 44, 8, 8, 34];
  const value = (y) => (has(y) && (!log || y > 0) ? (log ? Math.log10(y) : y) : null);
  const all = series.flatMap((s) => s.y.map(value).filter(has));
  const allX = series.flatMap((s) => s.x);
  const [x0, x1] = xRange || [Math.min(...allX), Math.max(...allX)];
  let [y0, y1] = yRange || (all.length ? [Math.min(...all), Math.max(...all)] : [0, 1]);
  if (!yRange) {
    if (!log && y0 > 0 && y0 < 0.5 * y1) y0 = 0;
    const room = (y1 - y0 || Math.abs(y1) || 1) * 0.05;
    if (y0 !== 0) y0 -= room;
    y1 += room;
  }
  const px = (x) => left + ((x - x0) / (x1 - x0 || 1)) * (W - left - right);
  const py = (y) => H - bottom - ((y - y0) / (y1 - y0 || 1)) * (H - top - bottom);
  const last = series.map((s) => `${s.name} ${round(s.y.filter(has).at(-1) ?? NaN)}`).slice(0, 6).join(", ");
  const svg = draw("svg", { class: "chart", viewBox: `0 0 ${W} ${H}`, role: "img", tabindex: 0, "aria-label": `${title}. At the right end: ${last}. Left and right arrow keys read values.` });
  for (const y of ticksOf(y0, y1, log)) {
    svg.append(draw("line", { class: "grid", x1: left, x2: W - right, y1: py(y), y2: py(y) }));
    const text = draw("text", { x: left - 6, y: py(y) + 4, "text-anchor": "end" });
    text.textContent = round(log ? 10 ** y : y);
    svg.append(text);
  }
  for (const x of ticksOf(x0, x1, false)) {
    const text = draw("text", { x: px(x), y: H - bottom + 15, "text-anchor": "middle" });
    text.textContent = round(x);
    svg.append(text);
  }
  const name = draw("text", { x: (left + W - right) / 2, y: H - 4, "text-anchor": "middle" });
  name.textContent = xName;
  svg.append(name);
  for (const s of series) {
    let path = "", pen = "M";
    s.x.forEach((x, i) => {
      const y = value(s.y[i]);
      if (!has(y)) pen = "M";
      else { path += `${pen}${px(x).toFixed(1)} ${py(y).toFixed(1)}`; pen = "L"; }
    });
    const width = s.width || 1.8;
    svg.append(draw("path", { class: "line", d: path || "M0 0", stroke: s.colour, "stroke-width": width, "stroke-dasharray": s.dash || null, opacity: s.opacity }));
    if (s.x.length < 12) s.x.forEach((x, i) => has(value(s.y[i])) && svg.append(draw("circle", { cx: px(x), cy: py(value(s.y[i])), r: width + 1, fill: s.colour, opacity: s.opacity })));
  }
  if (has(mark)) svg.append(draw("line", { class: "mark", x1: px(mark), x2: px(mark), y1: top, y2: H - bottom }));
  const cursor = draw("line", { class: "cursor", x1: 0, x2: 0, y1: top, y2: H - bottom, visibility: "hidden" });
  svg.append(cursor);
  const spoken = make("output", { class: "hidden", "aria-live": "polite" });
  const places = [...new Set(allX)].sort((a, b) => a - b);
  let place = -1;
  const read = (x) => {
    const rows = series.map((s) => ({ name: s.name, y: s.y[s.x.indexOf(x)], main: (s.width || 0) > 2 })).filter((s) => has(s.y));
    rows.sort((a, b) => b.main - a.main || b.y - a.y);
    const lines = rows.slice(0, 12).map((s) => `${s.name}  ${round(s.y)}`);
    if (rows.length > 12) lines.push(`and ${rows.length - 12} more`);
    return [`${xName} ${round(x)}`, ...lines].join("\n");
  };
  const point = (x, clientX, clientY, speak) => {
    cursor.setAttribute("x1", px(x)); cursor.setAttribute("x2", px(x)); cursor.setAttribute("visibility", "visible");
    const text = read(x), tip = $("tip");
    tip.textContent = text; tip.hidden = false;
    tip.style.left = `${Math.min(clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.max(8, Math.min(clientY + 14, innerHeight - tip.offsetHeight - 8))}px`;
    if (speak) spoken.textContent = text;
  };
  const leave = () => { cursor.setAttribute("visibility", "hidden"); $("tip").hidden = true; };
  svg.addEventListener("pointermove", (event) => {
    const area = svg.getBoundingClientRect();
    const x = x0 + (((event.clientX - area.left) / area.width) * W - left) / (W - left - right) * (x1 - x0);
    place = places.reduce((best, v, i) => (Math.abs(v - x) < Math.abs(places[best] - x) ? i : best), 0);
    if (places.length) point(places[place], event.clientX, event.clientY, false);
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !places.length) return;
    event.preventDefault();
    place = Math.max(0, Math.min(places.length - 1, place + step));
    const area = svg.getBoundingClientRect();
    point(places[place], area.left + (px(places[place]) / W) * area.width, area.top + 20, true);
  });
  const figure = make("figure", {}, make("figcaption", {}, title), svg, spoken);
  if (keys && series.length > 1) figure.append(keysOf(series));
  return figure;
}
function keysOf(series) {
  const items = series.filter((s) => !s.keyless).map((s) => {
    const sample = draw("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" }, draw("line", { x1: 0, x2: 22, y1: 4, y2: 4, stroke: s.colour, "stroke-width": Math.max(2, s.width || 2), "stroke-dasharray": s.dash || null, opacity: s.opacity }));
    return make("li", {}, sample, s.name);
  });
  return make("ul", { class: "keys" }, ...items);
}

// --- Sections -----------------------------------------------------------------------------------------------------
function big(number) {
  for (const [unit, size] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) if (number >= size) return `${(number / size).toFixed(number / size < 10 ? 2 : 1)} ${unit}`;
  return String(number);
}
function drawSummary() {
  const tile = (name, value, small, main) => make("dl", { class: `tile${main ? " main" : ""}` }, make("dt", {}, name), make("dd", { class: String(value).length > 9 ? "long" : null }, value, small ? make("small", {}, small) : null));
  const tiles = [];
  const names = { AP: "AP", AP50: "AP50", AP75: "AP75", APs: "AP of small", APm: "AP of medium", APl: "AP of large" };
  for (const [key, name] of Object.entries(names)) {
    const values = runs.map((run) => task(run).overall[key]);
    if (isPair) tiles.push(tile(name, difference(minus(values[1], values[0])), `${show(values[0])} → ${show(values[1])}`, key === "AP"));
    else tiles.push(tile(name, show(values[0]), { AP: "IoU 0.5 to 0.95", AP50: "IoU 0.5", AP75: "IoU 0.75", APs: "below 32² pixels", APm: "32² to 96² pixels", APl: "above 96² pixels" }[key], key === "AP"));
  }
  if (isPair) {
    const f1 = runs.map((run) => task(run).best_f1);
    tiles.push(tile("Best mean F1", difference(minus(f1[1], f1[0])), `${show(f1[0])} → ${show(f1[1])}`));
  } else tiles.push(tile("Best mean F1", show(task(runs[0]).best_f1), `at a score of ${(task(runs[0]).best_bin / 100).toFixed(2)}`));
  if (runs.every((run) => run.cost)) {
    const of = (read) => runs.map(read);
    const pair = (values) => [...new Set(values)].join(" → ");
    tiles.push(tile("Parameters", pair(of((r) => big(r.cost.parameters_at_inference))), `at inference; ${pair(of((r) => big(r.cost.parameters)))} in training`));
    tiles.push(tile("FLOPs", pair(of((r) => big(r.cost.flops).replace(" ", "\u00a0"))), `one picture of ${runs[0].cost.size.join(" × ")}`));
    tiles.push(tile("Time", pair(of((r) => (r.cost.seconds < 1 ? `${(1000 * r.cost.seconds).toFixed(0)} ms` : `${r.cost.seconds.toFixed(1)} s`))), `one picture, ${runs[0].cost.device}, where the report was made`));
  }
  $("tiles").replaceChildren(...tiles);
}
function chooseClass(k) {
  $("class").value = k;
  state.class = k;
  update();
}
function classLink(row) {
  if (row.index < 0) return row.name;
  const choose = () => {
    chooseClass(state.class === row.index ? -1 : row.index);
    document.querySelector(`[data-class="${row.index}"]`).focus(); // the table is a new one
  };
  return make("button", { type: "button", class: "link", title: "Show this class alone", "data-class": row.index, on: { click: choose } }, row.name);
}
function drawClasses() {
  const style = (k) => (k === state.class ? "chosen" : null);
  const caption = `${classes.length > 1 ? "Each class" : "The class"}, in percent`;
  if (isPair) {
    const [a, b] = runs.map((run) => task(run).classes);
    const rows = classes.map((name, index) => ({
      name, index, style: style(index), objects: a[index].objects, apA: a[index].AP, apB: b[index].AP, gain: minus(b[index].AP, a[index].AP),
      ap50A: a[index].AP50, ap50B: b[index].AP50, gain50: minus(b[index].AP50, a[index].AP50), f1A: a[index].f1, f1B: b[index].f1,
    }));
    const columns = [
      { key: "name", name: "Class", text: true, show: classLink }, { key: "objects", name: "Objects", show: (row) => String(row.objects) },
      { key: "apA", name: `AP ${runNames[0]}` }, { key: "apB", name: `AP ${runNames[1]}` }, { key: "gain", name: "Difference", show: (row) => difference(row.gain) },
      { key: "ap50A", name: `AP50 ${runNames[0]}` }, { key: "ap50B", name: `AP50 ${runNames[1]}` }, { key: "gain50", name: "Difference of AP50", show: (row) => difference(row.gain50) },
      { key: "f1A", name: `Best F1 ${runNames[0]}` }, { key: "f1B", name: `Best F1 ${runNames[1]}` },
    ];
    sortable($("class-table"), caption, columns, rows, { order: { key: "gain", down: false } });
    return;
  }
  const own = task(runs[0]);
  const rows = own.classes.map((row, index) => ({ ...row, index, style: style(index) }));
  const mean = { ...own.overall, name: "mean", index: -1, style: "mean", objects: rows.reduce((sum, row) => sum + row.objects, 0), f1: own.best_f1, score: own.best_bin / 100 };
  const columns = [
    { key: "name", name: "Class", text: true, show: classLink }, { key: "objects", name: "Objects", show: (row) => String(row.objects) },
    ...["AP", "AP50", "AP75", "APs", "APm", "APl"].map((key) => ({ key, name: key })),
    { key: "score", name: "Best score", title: "The score from which on F1 is best", show: (row) => (has(row.score) ? row.score.toFixed(3) : "–") },
    { key: "f1", name: "F1", title: "At the best score" }, { key: "precision", name: "Precision", title: "At the best score" }, { key: "recall", name: "Recall", title: "At the best score" },
  ];
  sortable($("class-table"), caption, columns, rows, { last: [mean] });
}
function drawCurves() {
  const recalls = Array.from({ length: 101 }, (_, i) => i / 100), scores = recalls.slice(0, 100);
  const few = classes.length <= 12;
  const charts = [["Precision by recall", "precision_by_recall", "recall", recalls], ["F1 by score", "f1", "score", scores], ["Precision by score", "precision", "score", scores], ["Recall by score", "recall", "score", scores]];
  let keys;
  $("curve-charts").replaceChildren(...charts.map(([title, key, x, places]) => {
    const series = [];
    runs.forEach((run, r) => {
      const rows = task(run).curves[key];
      if (!isPair) {
        classes.forEach((name, k) => rows[k] && k !== state.class && series.push({ name, x: places, y: rows[k], colour: COLOURS[k % 10], width: 1.1, opacity: state.class < 0 ? (few ? 0.75 : 0.35) : 0.18, keyless: !few, dash: few && k > 9 ? DASHES[1] : "" }));
      }
      const mean = rows[classes.length];
      if (mean) series.push({ name: isPair ? runNames[r] : "mean", x: places, y: mean, colour: isPair ? RUN_COLOURS[r] : "var(--text)", width: 2.8, opacity: state.class < 0 ? 1 : 0.5, dash: isPair && r ? "7 3" : "" });
      if (state.class >= 0 && rows[state.class]) {
        series.push({ name: (isPair ? `${runNames[r]}: ` : "") + classes[state.class], x: places, y: rows[state.class], colour: isPair ? RUN_COLOURS[r] : COLOURS[state.class % 10], width: 3, dash: isPair ? "2 2" : "" });
      }
    });
    keys = keysOf(series);
    return chart({ title, x, series, xRange: [0, 1], yRange: [0, 1], mark: x === "score" ? state.least / 100 : null, keys: false });
  }));
  $("curve-keys").replaceChildren(keys);
}
function errorNumber(run, kind, k) {
  const index = kinds.indexOf(kind);
  let sum = 0;
  for (const [e, c, bin, number] of task(run).counts) {
    if (e === index && (k < 0 || c === k)) sum += (kind === "missed" ? bin < state.least : bin >= state.least) ? number : 0;
  }
  return sum;
}
function drawErrors() {
  const rows = kinds.map((kind, i) => {
    const row = { kind };
    runs.forEach((run, r) => { row[`number${r}`] = errorNumber(run, kind, state.class); row[`cost${r}`] = task(run).errors[i].cost; });
    return row;
  });
  const most = Math.max(...rows.flatMap((row) => runs.map((_, r) => row[`cost${r}`] || 0)), 0.01);
  const meter = (value, colour) => make("span", {}, make("span", { class: "meter", "aria-hidden": "true" }, make("i", { style: `width:${(100 * value) / most}%;background:${colour}` })), show(value, 2));
  const open = (row) => make("button", { type: "button", class: "link kind", title: "Show pictures with such errors", on: { click: () => chooseKind(row.kind) } }, make("i", { style: `background:${colourOf(row.kind)}` }), row.kind);
  const name = (text, r) => (isPair ? `${text}, ${runNames[r]}` : text);
  const where = state.class < 0 ? "" : ` of ${classes[state.class]}`;
  const columns = [
    { key: "kind", name: "Kind", text: true, show: open }, { key: "what", name: "What it is", text: true, show: (row) => EXPLANATIONS[row.kind] },
    ...runs.flatMap((_, r) => [
      { key: `number${r}`, name: name("Errors", r), show: (row) => String(row[`number${r}`]) },
      { key: `cost${r}`, name: name("Costs AP50", r), show: (row) => meter(row[`cost${r}`], isPair ? RUN_COLOURS[r] : colourOf(row.kind)) },
    ]),
  ];
  const ap = runs.map((run) => show(task(run).errors[0].ap50)).join(" and ");
  sortable($("error-table"), `Errors${where} among detections with a score of ${(state.least / 100).toFixed(2)} or more; AP50 is ${ap}`, columns, rows);
}
function chooseKind(kind) {
  $("kind").value = state.kind = kind;
  state.cards = FIRST_CARDS;
  drawGallery();
  $("pictures").scrollIntoView();
  $("kind").focus({ preventScroll: true });
}
function drawConfusion() {
  if (isPair) return;
  const own = task(runs[0]), size = classes.length + 1;
  const matrix = Array.from({ length: size }, () => new Array(size).fill(0));
  for (const [row, column, bin, number] of own.confusion) if (bin >= state.least) matrix[row][column] += number;
  own.classes.forEach((entry, k) => { matrix[k][background] = entry.objects - matrix[k].reduce((a, b) => a + b, 0); });
  const name = (k) => (k === background ? "background" : classes[k]);
  const wrong = [];
  matrix.forEach((row, i) => row.forEach((number, j) => { if (number && i !== j) wrong.push([number, i, j]); }));
  wrong.sort((a, b) => b[0] - a[0]);
  let shown = Array.from({ length: size }, (_, k) => k);
  const limit = 30;
  if (size > limit + 1) {
    const total = new Array(size).fill(0);
    for (const [number, i, j] of wrong) { if (j !== background) total[i] += number; if (i !== background) total[j] += number; }
    shown = shown.slice(0, -1).sort((a, b) => total[b] - total[a]).slice(0, limit).sort((a, b) => a - b).concat(background);
  }
  $("confusion-note").textContent = `Objects and detections with a score of ${(state.least / 100).toFixed(2)} or more, paired whatever their classes where their IoU is 0.5 or more; detections choose in the order of their scores. ` +
    `Background: nothing was found, or there is nothing.` + (shown.length < size ? ` The ${limit} classes with the most confusions of ${classes.length} are shown.` : "");
  $("confusion-table").classList.toggle("many", shown.length > 13);
  const asShare = $("as-share").checked, most = Math.max(...shown.flatMap((i) => shown.map((j) => matrix[i][j])), 1);
  const head = make("tr", {}, make("th", { scope: "col" }, "is \\ taken for"), ...shown.map((j) => make("th", { scope: "col", title: name(j) }, name(j))));
  const body = shown.map((i) => {
    const sum = matrix[i].reduce((a, b) => a + b, 0) || 1;
    const cells = shown.map((j) => {
      const number = matrix[i][j], share = number / sum;
      if (i === background && j === background) return make("td", {}, "");
      const strength = Math.round(85 * Math.sqrt(asShare ? share : number / most));
      const colour = i === j ? "var(--correct)" : j === background ? "var(--missed)" : i === background ? "var(--background)" : "var(--class)";
      const title = i === j ? `${number} of ${sum} ${name(i)} are found` : i === background ? `${number} detections of ${name(j)} show background` : j === background ? `${number} of ${sum} ${name(i)} are not found` : `${number} of ${sum} ${name(i)} are taken for ${name(j)}`;
      return make("td", { title, class: i === j ? "own" : null, style: number ? `background:color-mix(in srgb, ${colour} ${strength}%, transparent)` : null }, number ? String(number) : "·");
    });
    return make("tr", { class: i === state.class ? "chosen" : null }, make("th", { scope: "row", title: name(i) }, name(i)), ...cells);
  });
  $("confusion-table").replaceChildren(make("caption", {}, "Rows: what is there. Columns: what is detected."), make("thead", {}, head), make("tbody", {}, ...body));
  const list = wrong.filter(([, i, j]) => i !== background && j !== background).slice(0, 12).map(([number, i, j]) => {
    const open = () => { chooseClass(i); chooseKind("class"); };
    return make("li", {}, make("button", { type: "button", class: "link", on: { click: open } }, `${name(i)} taken for ${name(j)}`), ` ${number} ×`);
  });
  $("confusion-list").replaceChildren(...(list.length ? list : [make("li", { class: "muted" }, "None at this score.")]));
}

// --- Pictures -----------------------------------------------------------------------------------------------------
// What a picture holds of a run at the chosen score: detections, and objects with what became of them.
let known = new Map(); // picture -> its contents of each run, at the chosen score
function contents(picture, r) {
  if (!known.has(picture)) known.set(picture, runs.map((_, i) => contentsOf(picture, i)));
  return known.get(picture)[r];
}
function contentsOf(picture, r) {
  const name = taskName(runs[r]);
  const found = picture.runs[r].filter((d) => d[name] && binOf(d[name][1]) >= state.least).map((d) => ({ class: d.class, box: d.box, mask: d.mask, kind: d[name][0], points: d[name][1] }));
  found.sort((a, b) => b.points - a.points);
  const objects = picture.objects.map((o) => {
    const [last, meant] = o.runs[r][name];
    return { class: o.class, box: o.box, mask: o.mask, crowd: o.crowd, isFound: o.crowd || last >= state.least, isMissed: !o.crowd && meant < state.least };
  });
  return { found, objects };
}
const isWrong = (d) => d.kind !== "correct" && d.kind !== "ignored";
function errorsIn({ found, objects }, k) {
  return found.filter((d) => isWrong(d) && (k < 0 || d.class === k)).length + objects.filter((o) => !o.isFound && (k < 0 || o.class === k)).length;
}
function matches(picture) {
  const k = state.class;
  const inClass = (x) => k < 0 || x.class === k;
  return runs.some((_, r) => {
    const { found, objects } = contents(picture, r);
    if (state.kind === "any") return k < 0 || found.some(inClass) || objects.some(inClass);
    if (state.kind === "missed") return objects.some((o) => o.isMissed && inClass(o));
    // An error of class concerns the class that is there as well as the one that it is taken for.
    if (state.kind === "class" && k >= 0) return found.some((d) => d.kind === "class" && (d.class === k || objects.some((o) => o.class === k && overlap(o.box, d.box) >= 0.5)));
    if (state.kind === "none") return !errorsIn({ found, objects }, k) && (k < 0 || objects.some(inClass));
    return found.some((d) => d.kind === state.kind && inClass(d));
  });
}
function overlap(a, b) {
  const w = Math.min(a[0] + a[2], b[0] + b[2]) - Math.max(a[0], b[0]), h = Math.min(a[1] + a[3], b[1] + b[3]) - Math.max(a[1], b[1]);
  const inside = Math.max(w, 0) * Math.max(h, 0);
  return inside / (a[2] * a[3] + b[2] * b[3] - inside);
}
function chosenPictures() {
  const rows = pictures.map((picture, index) => ({ picture, index, errors: runs.map((_, r) => errorsIn(contents(picture, r), state.class)) })).filter(({ picture }) => matches(picture));
  const total = (row) => row.errors.reduce((a, b) => a + b, 0);
  const orders = {
    worst: (a, b) => total(b) - total(a) || a.index - b.index,
    best: (a, b) => total(a) - total(b) || a.index - b.index,
    name: (a, b) => a.picture.file.localeCompare(b.picture.file, undefined, { numeric: true }),
    differ: (a, b) => a.index - b.index,
    first: (a, b) => (b.errors[1] - b.errors[0]) - (a.errors[1] - a.errors[0]) || a.index - b.index,
    second: (a, b) => (b.errors[0] - b.errors[1]) - (a.errors[0] - a.errors[1]) || a.index - b.index,
  };
  return rows.sort(orders[state.order]);
}
function overlay(picture, r, withLabels) {
  const { width, height } = picture;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const { found, objects } = contents(picture, r);
  const withMasks = $("show-masks").checked;
  const letters = Math.max(width, height) / 45;
  const inClass = (x) => state.class < 0 || x.class === state.class;
  const rect = (x, css, colour) => draw("rect", { class: `box ${css}`, x: x.box[0], y: x.box[1], width: x.box[2], height: x.box[3], style: colour ? `stroke:${colour}` : null });
  const mask = (x, colour) => draw("path", { class: "mask", d: x.mask, style: `fill:${colour};stroke:${colour}` });
  const taken = []; // where labels lie: [left, top, right]
  const label = (x, text, below) => {
    const long = text.length * 0.6 * letters;
    const left = Math.max(0, Math.min(x.box[0], width - long));
    let y = below ? Math.min(x.box[1] + x.box[3] + letters, height - 0.2 * letters) : Math.max(x.box[1] - 0.25 * letters, 0.85 * letters);
    const isFree = () => taken.every(([l, t, r]) => left > r || left + long < l || Math.abs(t - y) > letters);
    for (let tries = 0; tries < 5 && !isFree(); tries++) y += 1.1 * letters;
    taken.push([left, y, left + long]);
    const element = draw("text", { class: "box-label", x: left, y, "font-size": letters });
    element.textContent = text;
    svg.append(element);
  };
  if ($("show-truth").checked) {
    objects.forEach((o, i) => {
      if (!inClass(o)) return;
      const group = draw("g", { "data-item": `o${i}`, "data-truth": o.isMissed ? "missed" : o.isFound ? "found" : "lost" });
      if (withMasks && o.mask) {
        const path = mask(o, o.isMissed ? colourOf("missed") : "var(--truth)");
        path.classList.toggle("dashed", $("show-found").checked); // an outline, that the predictions' areas are seen
        group.append(path);
      }
      group.append(rect(o, "edge"), rect(o, "truth", o.isMissed ? colourOf("missed") : null));
      svg.append(group);
      if (withLabels && (!$("show-found").checked || !o.isFound)) label(o, classes[o.class] + (o.crowd ? " (crowd)" : o.isMissed ? " missed" : ""), true);
    });
  }
  if ($("show-found").checked) {
    // The best scores are drawn last, but have the first choice of places for their labels.
    if (withLabels) found.filter(inClass).forEach((d) => label(d, `${classes[d.class]} ${(d.points / 10000).toFixed(2)}`, false));
    const labels = [...svg.querySelectorAll("text")];
    [...found].reverse().forEach((d) => {
      if (!inClass(d)) return;
      const group = draw("g", { "data-item": `d${found.indexOf(d)}`, "data-kind": d.kind });
      if (withMasks && d.mask) group.append(mask(d, colourOf(d.kind)));
      group.append(rect(d, "edge"), rect(d, "", colourOf(d.kind)));
      svg.append(group);
    });
    svg.append(...labels); // on top
  }
  return svg;
}
const images = new Map(); // of cards, decoded once
function imageOf(picture, r) {
  if (!images.has(picture)) images.set(picture, runs.map(() => make("img", { src: picture.source, alt: "" })));
  return images.get(picture)[r];
}
function pane(picture, r, withLabels, image) {
  const tall = picture.height * 4 > picture.width * 3;
  const frame = make("div", { class: `frame ${tall ? "tall" : "wide"}`, style: `aspect-ratio:${picture.width} / ${picture.height}` }, image, overlay(picture, r, withLabels));
  return make("div", { class: "pane" }, isPair ? make("b", {}, runNames[r]) : null, frame);
}
const fileName = (picture) => picture.file.split("/").at(-1);
function errorText(errors) {
  return isPair ? errors.map((n) => n).join(" / ") + " errors" : errors[0] ? plural(errors[0], "error") : "no error";
}
// Names that begin alike, as those of tiles or frames, differ at the end.
const inShort = (name) => name.length > 26 ? `${name.slice(0, 8)}…${name.slice(-16)}` : name;
function drawGallery() {
  const chosen = chosenPictures();
  state.chosen = chosen.map((row) => row.picture);
  const cards = chosen.slice(0, state.cards).map(({ picture, errors }, i) => {
    const text = make("span", { class: "card-text" }, make("span", { title: picture.file }, inShort(fileName(picture))), make("span", {}, errorText(errors)));
    const panes = make("span", { class: "panes" }, ...runs.map((_, r) => pane(picture, r, false, imageOf(picture, r))));
    return make("li", {}, make("button", { type: "button", class: "card", "aria-label": `${fileName(picture)}, ${errorText(errors)}. Enlarge`, on: { click: () => openZoom(i) } }, panes, text));
  });
  $("gallery").replaceChildren(...cards);
  const of = pictures.length < data.num_images ? `${pictures.length} in this page (of ${data.num_images} test pictures; ${isPair ? "those with the greatest differences" : "the worst ones"}, and a few of the others)` : `${pictures.length} test pictures`;
  $("gallery-count").textContent = `${chosen.length} of ${of}.`;
  $("more").hidden = chosen.length <= state.cards;
}
function drawLegend() {
  const names = ["correct", ...kinds.filter((kind) => kind !== "missed"), "ignored"];
  const items = names.map((kind) => make("li", { title: EXPLANATIONS[kind] }, make("i", { style: `border-color:${colourOf(kind)}` }), kind === "ignored" ? "ignored (in a crowd)" : kind));
  items.push(make("li", { title: EXPLANATIONS.missed }, make("i", { class: "dashed", style: `border-color:${colourOf("missed")}` }), "missed object"));
  items.push(make("li", {}, make("i", { class: "dashed", style: "border-color:var(--muted)" }), "ground truth"));
  $("legend").replaceChildren(...items);
}

// --- Zoom ---------------------------------------------------------------------------------------------------------
const view = { index: 0, scale: 1, x: 0, y: 0 };
function openZoom(index) {
  view.index = index;
  if (!$("zoom").open) $("zoom").showModal();
  drawZoom();
  fit();
}
function drawZoom() {
  const picture = state.chosen[view.index];
  $("zoom-title").textContent = `${fileName(picture)} (${picture.width} × ${picture.height})`;
  for (const [id, isEnd] of [["zoom-previous", view.index === 0], ["zoom-next", view.index === state.chosen.length - 1]]) {
    if (isEnd && document.activeElement === $(id)) $("zoom-close").focus(); // a disabled button would lose the focus
    $(id).disabled = isEnd;
  }
  $("zoom-panes").replaceChildren(...runs.map((_, r) => pane(picture, r, $("show-labels").checked, make("img", { src: picture.source, alt: "" }))));
  for (const element of $("zoom-panes").children) listen(element);
  const tables = runs.map((run, r) => {
    const { found, objects } = contents(picture, r);
    const emphasise = (item, on) => $("zoom-panes").children[r].querySelectorAll(`[data-item="${item}"] .box`).forEach((x) => x.classList.toggle("strong", on));
    const row = (item, kind, cells) => make("tr", { on: { pointerenter: () => emphasise(item, true), pointerleave: () => emphasise(item, false) } }, ...cells.map((cell, i) => (i ? make("td", {}, cell) : make("th", { scope: "row" }, cell))), make("td", { class: "kind" }, make("i", { style: `background:${colourOf(kind)}` }), kind));
    const inClass = ([, x]) => state.class < 0 || x.class === state.class;
    const rows = [...found.entries()].filter(inClass).map(([i, d]) => row(`d${i}`, d.kind, [classes[d.class], (d.points / 10000).toFixed(3)]));
    rows.push(...[...objects.entries()].filter(inClass).filter(([, o]) => !o.isFound).map(([i, o]) => row(`o${i}`, o.isMissed ? "missed" : "not found", [classes[o.class], "–"])));
    const head = make("tr", {}, ...["Class", "Score", "Kind"].map((text) => make("th", { scope: "col" }, text)));
    return make("table", {}, make("caption", {}, `${isPair ? `${runNames[r]}: d` : "D"}etections, and objects that are not found`), make("thead", {}, head), make("tbody", {}, ...rows));
  });
  $("zoom-list").replaceChildren(...tables);
}
function place() {
  const picture = state.chosen[view.index];
  for (const element of $("zoom-panes").children) {
    const frame = element.querySelector(".frame");
    frame.style.width = `${picture.width * view.scale}px`;
    frame.style.height = `${picture.height * view.scale}px`;
    frame.style.left = `${view.x}px`;
    frame.style.top = `${view.y}px`;
  }
}
function fit() {
  const picture = state.chosen[view.index], area = $("zoom-panes").firstElementChild.getBoundingClientRect();
  view.scale = Math.min(area.width / picture.width, area.height / picture.height);
  view.x = (area.width - picture.width * view.scale) / 2;
  view.y = (area.height - picture.height * view.scale) / 2;
  place();
}
function zoomBy(factor, x, y) {
  const area = $("zoom-panes").firstElementChild.getBoundingClientRect();
  const [cx, cy] = [x ?? area.width / 2, y ?? area.height / 2];
  const scale = Math.max(0.05, Math.min(40, view.scale * factor));
  view.x = cx - ((cx - view.x) * scale) / view.scale;
  view.y = cy - ((cy - view.y) * scale) / view.scale;
  view.scale = scale;
  place();
}
function listen(element) {
  element.addEventListener("wheel", (event) => {
    event.preventDefault();
    const area = element.getBoundingClientRect();
    zoomBy(event.deltaY < 0 ? 1.2 : 1 / 1.2, event.clientX - area.left, event.clientY - area.top);
  }, { passive: false });
  element.addEventListener("pointerdown", (event) => { element.setPointerCapture(event.pointerId); event.preventDefault(); });
  element.addEventListener("pointermove", (event) => {
    if (!element.hasPointerCapture(event.pointerId)) return;
    view.x += event.movementX; view.y += event.movementY;
    place();
  });
}
function turn(step) {
  const next = view.index + step;
  if (next >= 0 && next < state.chosen.length) openZoom(next);
}

// --- Training and what was run ------------------------------------------------------------------------------------
function drawTraining() {
  const log = $("log").checked;
  let charts;
  if (isPair) {
    const shared = runs[0].training.filter((x) => !x.title.startsWith("Losses") && !x.title.startsWith("Logged") && runs[1].training.some((y) => y.title === x.title));
    charts = shared.map((first) => {
      const both = [first, runs[1].training.find((y) => y.title === first.title)];
      const names = [...new Set(both.flatMap((x) => x.series.map((s) => s.name)))];
      return { ...first, series: both.flatMap((x, r) => x.series.map((s) => ({ ...s, name: `${runNames[r]}: ${s.name}`, colour: RUN_COLOURS[r], dash: DASHES[names.indexOf(s.name) % 4] }))) };
    });
  } else {
    charts = runs[0].training.map((x) => {
      const names = [...new Set(x.series.map((s) => s.name))], layered = x.series.some((s) => has(s.layer));
      return { ...x, series: x.series.map((s) => ({ ...s, name: has(s.layer) ? `${s.name}, layer ${s.layer + 1}` : layered ? `${s.name}, last layer` : s.name, colour: COLOURS[names.indexOf(s.name) % 10], dash: has(s.layer) ? DASHES[1 + (s.layer % 3)] : "", opacity: has(s.layer) ? 0.7 : 1 })) };
    });
  }
  const last = Math.max(...charts.flatMap((x) => x.series.flatMap((s) => s.x)));
  const figures = charts.map((x) => chart({ title: x.title, x: "iteration", series: x.series, xRange: [0, last], log: log && x.log, yRange: x.title.startsWith("Average") ? [0, 100] : null }));
  $("training-charts").replaceChildren(...(figures.length ? figures : [make("p", { class: "muted" }, "There is no metrics.json in the folder of the run.")]));
}
function table(caption, head, rows) {
  return make("table", {}, make("caption", {}, caption), make("thead", {}, make("tr", {}, ...head.map((x) => make("th", { scope: "col" }, x)))), make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((x, i) => (i ? make("td", {}, x) : make("th", { scope: "row" }, x)))))));
}
function drawRun() {
  const columns = [];
  runs.forEach((run, r) => {
    columns.push(table(isPair ? runNames[r] : "The run", ["", ""], run.about));
    if (run.cost) {
      const rows = run.cost.parts.map((x) => [x.name, (x.parameters / 1e6).toFixed(2), (x.flops / 1e9).toFixed(2)]);
      columns.push(table(`${isPair ? `${runNames[r]}: c` : "C"}ost by part of the model; a multiplication with its addition counts once`, ["Part", "Parameters (M)", "GFLOPs"], rows));
    }
  });
  const parts = [make("div", { class: "columns" }, ...columns)];
  const options = isPair ? configPair() : runs[0].config;
  const text = isPair ? "Options in which the runs differ" : "Options that are not at their defaults";
  const filter = make("input", { type: "search", id: "option", placeholder: "like SOLVER" });
  const config = make("div", { class: "scroll", id: "config", tabindex: 0, role: "region", "aria-label": text });
  const list = () => {
    const rows = options.filter((x) => x.key.toLowerCase().includes(filter.value.trim().toLowerCase()));
    config.replaceChildren(table(`${text}: ${rows.length}`, ["Option", ...(isPair ? runNames : ["Value", "Default"])], rows.map((x) => [make("code", {}, x.key), ...(isPair ? x.values : [x.value, x.default]).map((v) => make("code", {}, v))])));
  };
  filter.addEventListener("input", list);
  list();
  parts.push(make("p", {}, make("label", { for: "option" }, "Options with "), filter), config);
  if (!isPair) {
    parts.push(make("h3", { style: "margin-top:1rem" }, "Go on from here"));
    for (const [what, line] of runs[0].commands) parts.push(make("p", {}, `To ${what}:`, make("code", { class: "command" }, line)));
  }
  $("run-content").replaceChildren(...parts);
}
function configPair() {
  const [a, b] = runs.map((run) => new Map(run.config.map((x) => [x.key, x])));
  const keys = [...new Set([...a.keys(), ...b.keys()])];
  const value = (map, other, key) => (map.has(key) ? map.get(key).value : other.get(key).default);
  return keys.map((key) => ({ key, values: [value(a, b, key), value(b, a, key)] })).filter((x) => x.values[0] !== x.values[1]);
}

// --- Together -----------------------------------------------------------------------------------------------------
function update() {
  $("score").value = state.least;
  $("score-value").textContent = (state.least / 100).toFixed(2);
  $("score").setAttribute("aria-valuetext", `${(state.least / 100).toFixed(2)}`);
  state.cards = FIRST_CARDS;
  known = new Map();
  drawSummary(); drawClasses(); drawCurves(); drawErrors(); drawConfusion(); drawGallery();
}
function bestScore() {
  return Math.max(1, Math.min(99, task(runs.at(-1)).best_bin));
}
function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").textContent = dark ? "Light" : "Dark";
  $("theme").setAttribute("aria-pressed", String(dark));
}
function start() {
  const option = (value, text) => make("option", { value }, text);
  $("title").textContent = isPair ? `${runNames[0]} and ${runNames[1]}` : runNames[0];
  const [, dataset] = runs[0].about.find(([what]) => what === "test dataset"), [, images] = runs[0].about.find(([what]) => what === "tested on");
  $("subtitle").textContent = `${dataset}: ${images}` + (isPair ? `. Differences: ${runNames[1]} against ${runNames[0]}` : "");
  $("footer").textContent = `Made by codetr_d2 ${data.version}. This file holds all that it shows.`;
  $("confusion").hidden = isPair; // each run's own page has it
  for (const section of document.querySelectorAll("main section:not([hidden])")) {
    const short = { summary: "Summary", classes: "Classes", curves: "Curves", errors: "Errors", confusion: "Confusion", pictures: "Pictures", training: "Training", run: "Run" }[section.id];
    $("sections").append(make("li", {}, make("a", { href: `#${section.id}` }, short)));
  }
  $("class").append(option(-1, "all classes"), ...classes.map((name, k) => option(k, name)));
  $("kind").append(option("any", "anything"), option("none", "no error"), ...kinds.map((kind) => option(kind, kind === "missed" ? "missed objects" : `errors: ${kind}`)));
  const orders = isPair ? [["differ", "most different first"], ["first", `${runNames[0]} better`], ["second", `${runNames[1]} better`]] : [["worst", "worst first"], ["best", "best first"]];
  $("order").append(...[...orders, ["name", "by file name"]].map(([value, text]) => option(value, text)));
  state.order = orders[0][0];
  $("classes-note").textContent = isPair ? "" : "Small objects are below 32² pixels, large ones above 96². The best score is that from which on the F1 of the class is best. A class name shows that class alone in all sections.";
  const hasMasks = runs.some((run) => run.tasks.segm);
  $("task-choice").hidden = !hasMasks;
  $("show-masks-label").hidden = !hasMasks;
  if (isPair) $("gallery").classList.add("pairs");

  let frame = 0;
  $("score").addEventListener("input", () => {
    state.least = Number($("score").value);
    $("score-value").textContent = (state.least / 100).toFixed(2);
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(update);
  });
  $("best-score").addEventListener("click", () => { state.least = bestScore(); update(); });
  $("class").addEventListener("change", () => chooseClass(Number($("class").value)));
  $("task-choice").addEventListener("change", () => { state.task = document.querySelector("[name=task]:checked").value; state.least = bestScore(); update(); });
  $("as-share").addEventListener("change", drawConfusion);
  $("kind").addEventListener("change", () => { state.kind = $("kind").value; state.cards = FIRST_CARDS; drawGallery(); });
  $("order").addEventListener("change", () => { state.order = $("order").value; drawGallery(); });
  for (const id of ["show-truth", "show-found", "show-masks", "show-labels"]) $(id).addEventListener("change", drawGallery);
  $("more").addEventListener("click", () => {
    const before = state.cards;
    state.cards += 2 * FIRST_CARDS;
    drawGallery();
    $("gallery").children[before]?.firstElementChild.focus();
  });
  $("log").addEventListener("change", drawTraining);
  for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());
  $("zoom-previous").addEventListener("click", () => turn(-1));
  $("zoom-next").addEventListener("click", () => turn(1));
  $("zoom-in").addEventListener("click", () => zoomBy(1.4));
  $("zoom-out").addEventListener("click", () => zoomBy(1 / 1.4));
  $("zoom-fit").addEventListener("click", fit);
  $("zoom-close").addEventListener("click", () => $("zoom").close());
  $("zoom").addEventListener("close", () => $("gallery").children[view.index]?.firstElementChild.focus());
  $("zoom").addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") turn(-1);
    else if (event.key === "ArrowRight") turn(1);
    else if (event.key === "+" || event.key === "=") zoomBy(1.4);
    else if (event.key === "-") zoomBy(1 / 1.4);
    else if (event.key === "0") fit();
    else return;
    event.preventDefault();
  });
  addEventListener("resize", () => $("zoom").open && fit());
  const dark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(dark.matches);
  dark.addEventListener("change", () => setTheme(dark.matches));
  $("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));

  state.least = bestScore();
  drawLegend(); update(); drawTraining(); drawRun();
}
start();
})();
