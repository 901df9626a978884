"use strict";
// The page's charts, as SVG. Texts from runs are untrusted: they reach the page through textContent and attributes alone.
const data = JSON.parse(document.getElementById("data").textContent);
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 4", "12 3", "1 4", "6 2 1 2"];
const MARGIN = { left: 46, right: 10, top: 8, bottom: 22 };
const HEIGHT = 170;
const smoothing = { window: 1 };
const hiddenRuns = new Set();
const drawn = [];
const allSteps = data.charts.flatMap((chart) => chart.lines.flatMap((line) => [line.steps[0], line.steps[line.steps.length - 1]]));
const span = { first: allSteps.reduce((one, other) => Math.min(one, other), Infinity), last: allSteps.reduce((one, other) => Math.max(one, other), 0) };

function make(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name in element && typeof value !== "string") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function makeSvg(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function swatch(style) {
  const svg = makeSvg("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" });
  svg.append(makeSvg("path", { d: "M0 5H26", class: `curve ${style.colour}`, "stroke-dasharray": style.dash }));
  return svg;
}

// Colour and dash say the run where there are several, else the curve.
function styleOf(index) {
  return { colour: `c${index % 8}`, dash: DASHES[(index + Math.floor(index / 8)) % 8] };
}

function visibleLines(chart) {
  const named = chart.lines.map((line, index) => {
    const several = data.runs.length > 1;
    return { ...line, name: several ? data.runs[line.run] : line.label, style: styleOf(several ? line.run : index) };
  });
  return named.filter((line) => !hiddenRuns.has(line.run));
}

function format(value) {
  if (value === null || value === undefined) return "none";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

function runningMean(values, width) {
  return values.map((value, end) => {
    const recent = values.slice(Math.max(0, end - width + 1), end + 1).filter((one) => one !== null);
    return recent.length ? recent.reduce((sum, one) => sum + one, 0) / recent.length : null;
  });
}

function ticks(low, high, count, whole) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  let size = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= raw * 0.999);
  if (whole) size = Math.max(1, Math.round(size));
  const found = [];
  for (let place = Math.ceil(low / size - 1e-9); place * size <= high + size * 1e-9; place += 1) found.push(place * size);
  return found;
}

function domainOf(chart, lines) {
  let [low, high] = chart.bounds || [Infinity, -Infinity];
  let { first, last } = span;  // one x axis for the whole page
  for (const line of lines) {
    for (const values of [line.values, line.low || [], line.high || []]) {
      for (const value of values) if (value !== null) { low = Math.min(low, value); high = Math.max(high, value); }
    }
  }
  if (low > high) [low, high] = [0, 1];
  if (low === high) { const pad = Math.abs(low) / 10 || 1; low -= pad; high += pad; }
  if (first === last) { first -= 1; last += 1; }
  return { low, high, first, last };
}

function pathOf(line, values, x, y) {
  let path = "";
  let pen = "M";
  values.forEach((value, index) => {
    if (value === null) { pen = "M"; return; }
    path += `${pen}${x(line.steps[index]).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = "L";
  });
  return path;
}

function drawLine(svg, line, x, y) {
  const { colour, dash } = line.style;
  const smooth = smoothing.window > 1 && line.values.length > smoothing.window;
  const raw = pathOf(line, line.values, x, y);
  if (smooth) svg.append(makeSvg("path", { d: raw, class: `curve faint ${colour}` }));
  const main = smooth ? pathOf(line, runningMean(line.values, smoothing.window), x, y) : raw;
  svg.append(makeSvg("path", { d: main, class: `curve ${colour}`, "stroke-dasharray": dash }));
  line.steps.forEach((step, index) => {
    if (line.low && line.low[index] !== null && line.high[index] !== null) {
      svg.append(makeSvg("path", { d: `M${x(step)} ${y(line.low[index])}V${y(line.high[index])}`, class: `curve ${colour}` }));
    }
    if (line.steps.length <= 30 && line.values[index] !== null && !smooth) {
      svg.append(makeSvg("circle", { cx: x(step), cy: y(line.values[index]), r: 2.4, class: colour }));
    }
  });
}

function draw(item) {
  const { chart, plot } = item;
  const width = Math.max(200, plot.clientWidth);
  const lines = visibleLines(chart);
  const { low, high, first, last } = domainOf(chart, lines);
  const x = (step) => MARGIN.left + ((step - first) / (last - first)) * (width - MARGIN.left - MARGIN.right);
  const y = (value) => HEIGHT - MARGIN.bottom - ((value - low) / (high - low)) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  const svg = makeSvg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, "aria-hidden": "true" });
  for (const value of ticks(low, high, 4, false)) {
    svg.append(makeSvg("path", { d: `M${MARGIN.left} ${y(value)}H${width - MARGIN.right}`, class: "gridline" }));
    svg.append(makeSvg("text", { x: MARGIN.left - 5, y: y(value) + 4, "text-anchor": "end" }, format(value)));
  }
  for (const step of ticks(first, last, Math.max(2, Math.floor(width / 75)), true)) {
    svg.append(makeSvg("text", { x: x(step), y: HEIGHT - 6, "text-anchor": "middle" }, String(step)));
  }
  svg.append(makeSvg("text", { x: 2, y: HEIGHT - 6 }, "step"));
  for (const line of lines) drawLine(svg, line, x, y);
  item.cursor = makeSvg("path", { class: "cursor", d: "" });
  svg.append(item.cursor);
  item.steps = [...new Set(lines.flatMap((line) => line.steps))].sort((one, other) => one - other);
  item.place = Math.min(item.place ?? item.steps.length - 1, item.steps.length - 1);
  Object.assign(item, { lines, x, first, last, width });
  plot.replaceChildren(svg);
  pointAt(item, item.place, false);
}

function pointAt(item, place, show) {
  const { plot, steps } = item;
  if (!steps.length) { item.readout.textContent = "No values: all runs are hidden."; return; }
  item.place = Math.max(0, Math.min(place, steps.length - 1));
  const step = steps[item.place];
  const values = [];
  for (const line of item.lines) {
    const index = line.steps.lastIndexOf(step);
    if (index < 0) continue;
    const range = line.low ? ` (${format(line.low[index])} to ${format(line.high[index])})` : "";
    values.push(`${line.name} ${format(line.values[index])}${range}`);
  }
  const text = `step ${step}: ${values.join(" · ")}`;
  plot.setAttribute("aria-valuemin", steps[0]);
  plot.setAttribute("aria-valuemax", steps[steps.length - 1]);
  plot.setAttribute("aria-valuenow", step);
  plot.setAttribute("aria-valuetext", text);
  item.readout.textContent = text;
  if (show) item.cursor.setAttribute("d", `M${item.x(step)} ${MARGIN.top}V${HEIGHT - MARGIN.bottom}`);
}

function listen(item) {
  const { plot } = item;
  const follow = (event) => {
    const at = event.clientX - plot.getBoundingClientRect().left;
    let nearest = 0;
    item.steps.forEach((step, place) => {
      if (Math.abs(item.x(step) - at) < Math.abs(item.x(item.steps[nearest]) - at)) nearest = place;
    });
    pointAt(item, nearest, true);
  };
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("keydown", (event) => {
    const leap = Math.max(1, Math.round(item.steps.length / 10));
    const moves = { ArrowLeft: item.place - 1, ArrowDown: item.place - 1, ArrowRight: item.place + 1, ArrowUp: item.place + 1,
      PageDown: item.place - leap, PageUp: item.place + leap, Home: 0, End: item.steps.length - 1 };
    if (event.key in moves) { event.preventDefault(); pointAt(item, moves[event.key], true); }
  });
}

function valuesTable(item) {
  const head = make("tr", null, make("th", { scope: "col" }, "step"));
  for (const line of item.lines) head.append(make("th", { scope: "col" }, line.name));
  const body = make("tbody", null);
  const byStep = item.lines.map((line) => new Map(line.steps.map((step, index) => [step, line.values[index]])));
  for (const step of item.steps) {
    const row = make("tr", null, make("th", { scope: "row" }, String(step)));
    for (const values of byStep) row.append(make("td", null, values.has(step) ? format(values.get(step)) : ""));
    body.append(row);
  }
  return make("table", null, make("thead", null, head), body);
}

function makeChart(chart) {
  const unit = chart.unit ? ` (${chart.unit})` : "";
  const title = make("h4", null, chart.title, make("span", { class: "unit" }, unit));
  const readout = make("output", { class: "readout" });
  const plot = make("div", { class: "plot", tabindex: "0", role: "slider", "aria-label": `${chart.title}${unit}, by step` });
  const keys = make("div", { class: "keys" });
  const table = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Values of ${chart.title}` });
  const details = make("details", null, make("summary", null, "Values as a table"), table);
  const about = make("p", null, chart.about);
  const figure = make("figure", null, make("figcaption", null, title, about), keys, plot, readout, details);
  const item = { chart, plot, readout, keys, details, table };
  details.addEventListener("toggle", () => table.replaceChildren(details.open ? valuesTable(item) : ""));
  listen(item);
  drawn.push(item);
  return figure;
}

function refresh(item) {
  if (!item.plot.clientWidth) return;  // inside a closed part of the page: drawn when it opens
  draw(item);
  const shown = item.lines.length <= 8 ? item.lines : [];
  item.keys.replaceChildren(...shown.map((line) => make("span", null, swatch(line.style), make("bdi", null, line.name))));
  if (item.details.open) item.table.replaceChildren(valuesTable(item));
}

function showCharts() {
  const place = document.getElementById("charts");
  if (!data.charts.length) { place.append(make("p", { class: "soft" }, "No metrics yet.")); return; }
  const groups = new Map();
  for (const chart of data.charts) groups.set(chart.group, [...(groups.get(chart.group) || []), chart]);
  for (const [group, charts] of groups) {
    const grid = make("div", { class: "grid" }, ...charts.map(makeChart));
    if (!group.startsWith("Everything else")) { place.append(make("h3", null, group), grid); continue; }
    const details = make("details", null, make("summary", null, `${group} (${charts.length})`), grid);
    details.addEventListener("toggle", () => drawn.filter((item) => details.contains(item.plot)).forEach(refresh));
    place.append(details);
  }
  showChartControls();
  let width = 0;
  new ResizeObserver(() => {
    if (place.clientWidth !== width) { width = place.clientWidth; drawn.forEach(refresh); }
  }).observe(place);
}

function showChartControls() {
  const controls = document.getElementById("chart-controls");
  const choice = make("select", null);
  for (const window of [1, 5, 10, 50]) {
    choice.append(make("option", { value: String(window) }, window === 1 ? "none" : `mean of ${window} steps`));
  }
  choice.addEventListener("change", () => { smoothing.window = Number(choice.value); drawn.forEach(refresh); });
  if (data.runs.length > 1) {
    const legend = make("div", { class: "legend" });
    data.runs.forEach((run, index) => {
      const box = make("input", { type: "checkbox", checked: true });
      box.addEventListener("change", () => { hiddenRuns[box.checked ? "delete" : "add"](index); drawn.forEach(refresh); });
      legend.append(make("label", null, box, swatch(styleOf(index)), make("bdi", null, run)));
    });
    controls.append(make("fieldset", null, make("legend", null, "Runs shown"), legend));
  }
  controls.append(make("label", null, "Smoothing", choice));
}

showCharts();
