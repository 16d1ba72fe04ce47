"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)").matches;
const ink = dark ? "#e6edf3" : "#1b1f24", line = dark ? "#3d444d" : "#d1d9e0";
const config = {
  background: "transparent", font: "system-ui, sans-serif", view: { stroke: line },
  axis: {
    labelColor: ink, titleColor: ink, gridColor: line, domainColor: line, tickColor: line,
    labelOverlap: "greedy", labelSeparation: 6,
  },
  legend: { labelColor: ink, titleColor: ink, orient: "bottom" },
  line: { color: dark ? "#79c0ff" : "#0550ae" }, point: { color: dark ? "#79c0ff" : "#0550ae" },
  bar: { color: dark ? "#79c0ff" : "#0550ae" }, rule: { color: ink },
  style: {
    alarm: { color: dark ? "#ffa657" : "#c2410c", opacity: 0.25 },
    aside: { color: dark ? "#9da7b1" : "#59636e" },
  },
};

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

const FIGURES = 60;
function figures(rows) {
  const every = Math.ceil(rows.length / FIGURES), names = Object.keys(rows[0] || {});
  const table = element("table", "", { class: "figures" }), head = table.createTHead().insertRow(), body = table.createTBody();
  for (const name of names) head.append(element("th", name, { scope: "col" }));
  rows.filter((_, place) => place % every === 0).forEach((row) => {
    const cells = body.insertRow();
    for (const name of names) {
      const value = row[name];
      cells.insertCell().textContent = typeof value === "number" ? +value.toPrecision(5) : value;
    }
  });
  const room = element("div", "", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Figures" });
  room.append(table);
  return room;
}

const waiting = [];
function draw(place, spec) {
  for (const panel of spec.panels) {
    const chart = element("div", "", { class: "chart" });
    // Of a chart in layers the last has the figures.
    const rows = (panel.data ?? panel.layer.at(-1).data).values, more = element("details", "");
    more.append(element("summary", "figures"));
    more.addEventListener("toggle", () => { if (more.open && !more.querySelector("table")) more.append(figures(rows)); });
    place.append(chart, more);
    const options = { actions: false, ast: true, renderer: "svg", config };
    // A page has many charts: those near the window are drawn first, the others while the browser has nothing to do.
    let drawn = false;
    const once = () => { if (!drawn) { drawn = true; vegaEmbed(chart, panel, options); } };
    waiting.push(once);
    new IntersectionObserver((seen, watch) => {
      if (seen.some((one) => one.isIntersecting)) { watch.disconnect(); once(); }
    }, { rootMargin: "400px" }).observe(chart);
  }
}
document.querySelectorAll(".charts").forEach((place, number) => draw(place, data.specs[number]));
const idle = window.requestIdleCallback ?? ((work) => setTimeout(work, 50));
function drawNext() {
  const next = waiting.shift();
  if (next) { next(); idle(drawNext); }
}
addEventListener("load", () => idle(drawNext));

const get = (name) => document.getElementById(name);
if (get("controls")) {
  // Behind the iterations stand stages whose responses have none.
  const place = (row) => (row.finished ? row.step + 0.5 : row.step ?? row.stage);
  const named = (at) => (Number.isInteger(at) ? `iteration ${at}` : typeof at === "number" ? "after the last update" : at);
  const last = data.samples.reduce((most, row) => Math.max(most, row.step ?? 0), 0);
  const order = (at) => (typeof at === "number" ? at : Infinity);
  const steps = [...new Set(data.samples.map(place))].sort((a, b) => (order(a) === order(b) ? 0 : order(a) - order(b)));
  const prompts = [...new Set(data.samples.filter((row) => row.watched).map((row) => row.prompt))];
  const PAGE = 20;
  let shown = PAGE;
  get("step").max = Math.max(0, steps.length - 1);
  get("step").value = Math.max(0, steps.indexOf(last));
  get("step").disabled = steps.length < 2;
  for (const prompt of prompts) get("prompt").append(element("option", prompt.slice(0, 80), { value: prompt }));
  get("prompt").parentElement.hidden = !prompts.length;
  get("colour").parentElement.hidden = !data.samples.some((row) => row.tokens);

  const number = (score) => (typeof score === "number" ? score : -Infinity);
  const rounded = (score) => (typeof score === "number" ? (score < 0 ? "" : "+") + score.toFixed(2) : String(score ?? "no number"));

  function chosen() {
    const step = steps[get("step").value], words = get("search").value.toLowerCase(), prompt = get("prompt").value;
    const first = get("order").value;
    // A search, and a prompt that was watched, go through all iterations.
    const rows = data.samples.filter((row) =>
      (prompt ? row.prompt === prompt && row.watched : words || place(row) === step) &&
      (!words || (row.prompt + "\n" + row.response).toLowerCase().includes(words)));
    if (first) rows.sort((a, b) => (number(a.score) - number(b.score)) * (first === "worst" ? 1 : -1));
    return rows;
  }

  function coloured(row, column) {
    const text = element("p", "", { dir: "auto" });
    if (row.tokens[0]?.length === 2 && column === 2) {
      text.append(row.response, element("span", " (no advantages: no model learns from it)", { class: "soft" }));
      return text;
    }
    const most = Math.max(1e-6, ...row.tokens.map((token) => Math.abs(token[column])));
    for (const token of row.tokens) {
      const share = Math.round(60 * Math.abs(token[column]) / most), hue = token[column] < 0 ? "255 120 80" : "60 130 255";
      text.append(element("span", token[0], { style: `background: rgb(${hue} / ${share}%)`, title: String(token[column]) }));
    }
    return text;
  }

  function card(row) {
    const made = element("article", "", { class: "sample" }), head = element("p", "", { class: "soft" });
    const from = row.step === undefined ? row.stage : `${row.stage}, ${named(place(row))}`;
    head.append(element("span", rounded(row.score), { class: "score" }), ` ${from}${row.watched ? ", watched" : ""}${row.ended === false ? ", did not end" : ""}`);
    made.append(head, element("p", row.prompt, { dir: "auto", class: "soft" }));
    if (row.before !== undefined) made.append(element("p", `before (${rounded(row.score_before)}): ${row.before}`, { dir: "auto" }));
    const colour = get("colour").value;
    made.append(row.tokens && colour ? coloured(row, Number(colour)) : element("p", row.response, { dir: "auto" }));
    return made;
  }

  function show() {
    const rows = chosen();
    get("at").textContent = named(steps[get("step").value]);
    get("step").setAttribute("aria-valuetext", get("at").textContent);
    get("count").textContent = `${Math.min(shown, rows.length)} of ${rows.length} responses`;
    get("samples").replaceChildren(...rows.slice(0, shown).map(card));
    get("more").hidden = rows.length <= shown;
  }
  get("controls").addEventListener("submit", (event) => event.preventDefault());
  get("controls").addEventListener("input", () => { shown = PAGE; show(); });
  get("more").addEventListener("click", () => { shown += PAGE; show(); });
  show();
}
