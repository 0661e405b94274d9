// Draws one figure: curves over steps as SVG, with a caption that shows the values at the last or selected step.

import { decades, means, number, thinned, ticks } from "./numbers.js";

const SVG = "http://www.w3.org/2000/svg";
const MAX_POINTS = 1000;
const NUM_MEANS = 120;
// More curves than this in one figure would be hidden by each other's noise.
const MAX_BANDS = 3;
const NUM_COLORS = 8;
const LEFT = 52, RIGHT = 12, TOP = 8, BOTTOM = 22;

function svg(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function html(name, className, text) {
  const node = document.createElement(name);
  node.className = className;
  node.textContent = text;
  return node;
}

// The range of steps of all figures, and the step that is selected in any of them.
export class Steps {
  constructor() {
    this.low = 0;
    this.high = 1;
    this.at = null;
    this.charts = [];
    this.isDue = false;
  }

  cover(low, high) {
    [this.low, this.high] = low < high ? [low, high] : [low - 1, low + 1];
  }

  point(step) {
    this.at = step;
    if (this.isDue) return;
    this.isDue = true;
    requestAnimationFrame(() => {
      this.isDue = false;
      for (const chart of this.charts) chart.readOut();
    });
  }
}

export class Chart {
  // `isLog`: use a logarithmic scale if the values span more than two decades.
  constructor(steps, { title, unit, isLog = false, isWide = false }) {
    this.steps = steps;
    this.title = title;
    this.unit = unit;
    this.mayBeLog = isLog;
    this.height = isWide ? 260 : 180;
    this.series = [];
    this.marks = [];
    this.chosen = null;
    this.figure = document.createElement("figure");
    this.figure.hidden = true;
    if (isWide) this.figure.className = "wide";
    this.heading = html("h3", "", `${title} `);
    this.heading.append(html("small", "", unit));
    this.legend = html("div", "legend", "");
    this.skipped = html("span", "marks", "");
    this.names = "";
    const caption = document.createElement("figcaption");
    caption.append(this.heading, this.legend);
    this.picture = svg("svg", { height: this.height, role: "img" });
    this.name = svg("title", {}, `${title}, ${unit}, over steps`);
    this.figure.append(caption, this.picture);
    this.picture.addEventListener("pointermove", (event) => steps.point(this.stepAt(event.offsetX)));
    this.picture.addEventListener("pointerleave", () => steps.point(null));
    steps.charts.push(this);
  }

  // `series` is [[name, points], ...]; the name "" has no legend entry. `marks` are skipped steps.
  show(series, marks = []) {
    const [low, high] = extent(series.flatMap(([, points]) => points.map((point) => point[1])).filter((y) => y > 0));
    this.isLog = this.mayBeLog && high > 100 * low;
    const places = styles(series.map(([name]) => name));
    this.series = series.map(([name, points]) => {
      const isLong = points.length > 2 * NUM_MEANS;
      return {
        name,
        points,
        className: places.get(name),
        // This many points form a band, so a curve through their means shows the trend.
        curves: [
          ...(isLong && series.length > MAX_BANDS ? [] : [{ band: isLong, points: thinned(points, MAX_POINTS) }]),
          ...(isLong ? [{ band: false, points: means(points, NUM_MEANS, this.isLog) }] : []),
        ],
      };
    });
    this.marks = marks;
    this.figure.hidden = !series.length;
    this.draw();
  }

  draw() {
    if (this.figure.hidden) return;
    const width = this.picture.clientWidth, bottom = this.height - BOTTOM;
    const x = linear(this.steps.low, this.steps.high, LEFT, width - RIGHT);
    const y = this.vertical(bottom);
    this.x = x;
    this.width = width;
    const nodes = [this.name];
    for (const [tick, text] of y.ticks) {
      nodes.push(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) }));
      nodes.push(svg("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, text));
    }
    for (const tick of ticks(this.steps.low, this.steps.high, Math.max(2, Math.floor(width / 70)), 1)) {
      // Keep the outermost numbers within the picture.
      const anchor = x(tick) > width - 24 ? "end" : "middle";
      nodes.push(svg("text", { x: Math.min(x(tick), width - 2), y: this.height - 6, "text-anchor": anchor }, number(tick)));
    }
    for (const step of this.marks) nodes.push(svg("line", { class: "mark", x1: x(step), x2: x(step), y1: bottom - 8, y2: bottom }));
    for (const { name, points, curves, className } of this.series) {
      const faded = this.chosen !== null && this.chosen !== name ? " faded" : "";
      for (const { band, points: drawn } of curves) {
        nodes.push(svg("path", { class: `curve ${className}${band ? " band" : ""}${faded}`, d: path(drawn, x, y) }));
      }
      // Few points are drawn individually; a single point would have no line at all.
      if (points.length > 30) continue;
      for (const [px, py] of points) {
        if (y.has(py)) nodes.push(svg("circle", { class: `point ${className}${faded}`, cx: x(px), cy: y(py), r: 2.5 }));
      }
    }
    this.cursor = svg("line", { class: "cursor", y1: TOP, y2: bottom });
    this.at = svg("text", { class: "at", y: this.height - 6, "text-anchor": "middle" });
    this.picture.replaceChildren(...nodes, this.cursor, this.at);
    this.writeCaption();
    this.readOut();
  }

  vertical(bottom) {
    const drawn = this.series.flatMap(({ curves }) => curves.flatMap(({ points }) => points.map((point) => point[1])));
    let [low, high] = extent(drawn.filter((y) => y !== null && (!this.isLog || y > 0)));
    if (this.isLog) {
      const place = linear(Math.log10(low) - 0.1, Math.log10(high) + 0.1, bottom, TOP);
      const y = (value) => place(Math.log10(value));
      y.has = (value) => value > 0;
      y.ticks = decades(low, high, 5).map((tick) => [tick, number(tick)]);
      return y;
    }
    if (low === high) [low, high] = low ? [low - Math.abs(low) / 2, high + Math.abs(high) / 2] : [0, 1];
    // Start the axis at zero if that wastes little of the picture.
    const margin = (high - low) * 0.06;
    low = low > 0 && low < high / 2 ? 0 : low - (low !== 0) * margin;
    const y = linear(low, high + margin, bottom, TOP);
    y.has = (value) => value !== null;
    const found = ticks(low, high + margin, 4);
    // Use enough digits to distinguish neighboring ticks.
    const digits = Math.max(4, Math.ceil(Math.log10(Math.max(Math.abs(low), Math.abs(high)) / (high - low))) + 3);
    y.ticks = found.map((tick) => [tick, number(tick, Math.min(digits, 15))]);
    return y;
  }

  stepAt(offset) {
    const wanted = this.x.inverse(offset);
    const steps = this.series.map(({ points }) => nearest(points, wanted)[0]);
    return steps.reduce((best, step) => (Math.abs(step - wanted) < Math.abs(best - wanted) ? step : best));
  }

  // The legend is kept while its names are unchanged, so that keyboard focus is not lost.
  writeCaption() {
    this.heading.lastChild.textContent = this.isLog ? `${this.unit}, log scale` : this.unit;
    const names = JSON.stringify(this.series.map(({ name }) => name));
    if (names !== this.names) {
      this.names = names;
      this.chosen = null;
      this.legend.replaceChildren(...this.series.map((entry) => this.entry(entry)), this.skipped);
    }
    this.skipped.textContent = this.marks.length ? `${number(this.marks.length)} skipped` : "";
  }

  entry({ name, className }) {
    const value = html("span", "value", "");
    if (!name) return value;
    // A pressed entry brings its curve to the front.
    const button = html("button", "key", "");
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    button.append(line(className), html("span", "name", name), value);
    button.addEventListener("click", () => {
      this.chosen = this.chosen === name ? null : name;
      for (const other of this.legend.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button && this.chosen === name));
      this.draw();
    });
    return button;
  }

  readOut() {
    if (this.figure.hidden || !this.cursor) return;
    const step = this.steps.at;
    this.cursor.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step !== null) {
      const x = this.x(step);
      this.cursor.setAttribute("x1", x);
      this.cursor.setAttribute("x2", x);
      // Place the label over the axis and within the picture.
      this.at.setAttribute("x", Math.min(Math.max(x, LEFT), this.width - 36));
    }
    const values = this.legend.querySelectorAll(".value");
    this.series.forEach(({ points }, index) => {
      const y = (step === null ? points.at(-1) : nearest(points, step))[1];
      values[index].textContent = y === null ? "not finite" : number(y);
    });
    this.at.textContent = step === null ? "" : `step ${number(step)}`;
  }
}

// Assign a color to each name. The two factors of a group of layers share a color, and B's curve is dashed.
function styles(names) {
  const found = new Map(), colors = new Map();
  for (const name of names) {
    const group = name.replace(/^[AB] /, "");
    if (!colors.has(group)) colors.set(group, colors.size);
    const dash = (name.startsWith("B ") ? 1 : 0) + 2 * (Math.floor(colors.get(group) / NUM_COLORS) % 2);
    found.set(name, `series-${colors.get(group) % NUM_COLORS} dash-${dash}`);
  }
  return found;
}

function line(className) {
  const node = svg("svg", { class: "line", width: 22, height: 8, "aria-hidden": "true" });
  node.append(svg("path", { class: `curve ${className}`, d: "M0 4L22 4" }));
  return node;
}

function path(points, x, y) {
  let isDown = false, drawn = "";
  for (const [px, py] of points) {
    if (y.has(py)) drawn += `${isDown ? "L" : "M"}${x(px).toFixed(1)} ${y(py).toFixed(1)}`;
    isDown = y.has(py);
  }
  return drawn;
}

function linear(low, high, from, to) {
  const place = (value) => from + ((value - low) / (high - low)) * (to - from);
  place.inverse = (at) => low + ((at - from) / (to - from)) * (high - low);
  return place;
}

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : [0, 0];
}

// Points are sorted by step.
function nearest(points, step) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - points[low - 1][0] < points[low][0] - step ? points[low - 1] : points[low];
}
