// One figure: curves over steps, as SVG, with a caption that reads out the last or the pointed-at step.

import { means, number, thinned, ticks } from "./numbers.js";

const SVG = "http://www.w3.org/2000/svg";
const MAX_POINTS = 1000;
const MAX_SERIES = 6;
const NUM_MEANS = 120;
const HEIGHT = 190;
const LEFT = 52, RIGHT = 10, TOP = 8, BOTTOM = 22;

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

export class Chart {
  // `series` is [[name, [[step, value], ...]], ...]; a name of "" needs no legend.
  constructor(title, unit) {
    this.title = title;
    this.unit = unit;
    this.series = [];
    this.at = null;
    this.figure = document.createElement("figure");
    this.caption = document.createElement("figcaption");
    this.picture = svg("svg", { height: HEIGHT, role: "img" });
    this.picture.append(svg("title", {}, `${title}, ${unit}, over steps`));
    this.figure.append(this.caption, this.picture);
    this.picture.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.picture.addEventListener("pointerleave", () => this.point(null));
  }

  show(series) {
    this.series = series.slice(0, MAX_SERIES).map(([name, points]) => {
      // So many points are a band; a curve through their means shows where it goes.
      const course = points.length > 2 * NUM_MEANS ? means(points, NUM_MEANS) : [];
      return [name, thinned(points, MAX_POINTS), course];
    });
    this.figure.hidden = !this.series.some(([, points]) => points.length);
    this.draw();
  }

  point(offset) {
    this.at = offset;
    this.draw();
  }

  draw() {
    if (this.figure.hidden) return;
    const width = this.picture.clientWidth || 384;
    const all = this.series.flatMap(([, points]) => points);
    const x = scale(all.map((p) => p[0]), LEFT, width - RIGHT, 0);
    const y = scale(all.map((p) => p[1]), HEIGHT - BOTTOM, TOP, 0.06);
    const nodes = [this.picture.firstChild];
    for (const tick of ticks(y.low, y.high, 4)) {
      nodes.push(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) }));
      nodes.push(svg("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, number(tick)));
    }
    for (const tick of ticks(x.low, x.high, Math.max(2, Math.floor(width / 90)), 1)) {
      // The outermost numbers stay within the picture.
      const anchor = x(tick) > width - 24 ? "end" : "middle";
      nodes.push(svg("text", { x: Math.min(x(tick), width - 2), y: HEIGHT - 6, "text-anchor": anchor }, number(tick)));
    }
    const step = this.at === null ? null : nearest(all, x.inverse(this.at));
    if (step !== null) nodes.push(svg("line", { class: "cursor", x1: x(step), x2: x(step), y1: TOP, y2: HEIGHT - BOTTOM }));
    const path = (points) => points.map(([px, py], i) => `${i ? "L" : "M"}${x(px).toFixed(1)} ${y(py).toFixed(1)}`).join("");
    this.series.forEach(([, points, course], index) => {
      nodes.push(svg("path", { class: `curve series-${index}${course.length ? " band" : ""}`, d: path(points) }));
      if (course.length) nodes.push(svg("path", { class: `curve series-${index}`, d: path(course) }));
      // A few points are measurements to be seen each; a single one would have no line at all.
      if (points.length <= 30) {
        for (const [px, py] of points) nodes.push(svg("circle", { class: `point series-${index}`, cx: x(px), cy: y(py), r: 2.5 }));
      }
    });
    this.picture.replaceChildren(...nodes);
    this.describe(step);
  }

  describe(step) {
    const title = document.createElement("h3");
    title.append(`${this.title} `, html("small", "", this.unit));
    const parts = [title];
    this.series.forEach(([name, points], index) => {
      if (!points.length) return;
      const [, value] = step === null ? points.at(-1) : points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
      parts.push(html("span", name ? `key series-${index}` : "", name ? `${name} ${number(value)}` : number(value)));
    });
    parts.push(html("span", "at", step === null ? "" : `step ${number(step)}`));
    this.caption.replaceChildren(...parts);
  }
}

function scale(values, from, to, margin) {
  let low = Math.min(...values), high = Math.max(...values);
  if (low === high) [low, high] = [low - (Math.abs(low) / 2 || 0.5), high + (Math.abs(high) / 2 || 0.5)];
  // Amounts start at zero where that costs little of the picture.
  if (margin && low > 0 && low < high / 2) low = 0;
  else if (margin && low !== 0) low -= (high - low) * margin;
  if (margin) high += (high - low) * margin;
  const place = (value) => from + ((value - low) / (high - low)) * (to - from);
  place.low = low;
  place.high = high;
  place.inverse = (at) => low + ((at - from) / (to - from)) * (high - low);
  return place;
}

function nearest(points, step) {
  return points.reduce((best, [x]) => (Math.abs(x - step) < Math.abs(best - step) ? x : best), points[0][0]);
}
