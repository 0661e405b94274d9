// Figures of the metrics in the order of the page.

import { Chart, Steps } from "./chart.js";

const GIB = 2 ** 30;

// Read the values of a line by series; a line or run that lacks a field adds nothing, and null is a gap.
const value = (field, scale = 1) => (line) => ({ "": line[field] && line[field] * scale });
const values = (field, rename = plain) => (line) =>
  Object.fromEntries(Object.entries(line[field] ?? {}).map(([name, y]) => [rename(name), y]));

const SECTIONS = [
  ["Learning", [
    { title: "Loss", unit: "nats per token", read: value("loss"), hasMarks: true },
    { title: "Held-out KL", unit: "nats per token", read: values("held_out_kl") },
    { title: "Worth of the own prompt", unit: "nats per token", read: worth },
  ]],
  ["Adapters", [
    { title: "‖BA‖ / ‖W‖", unit: "by kind of layer", read: values("adapter_relative_norm"), isLog: true },
    { title: "Cosine between prompts", unit: "1: no difference", read: value("adapter_cosine") },
  ]],
  ["Optimizer", [
    { title: "Gradient norm", unit: "before clipping", read: value("grad_norm"), isLog: true },
    { title: "Learning rate", unit: "of all but B's heads", read: value("learning_rate") },
    { title: "Gradient norm by group", unit: "A and B of each group of layers", read: values("grad_norms", group), isLog: true, isWide: true },
  ]],
  ["Machine", [
    { title: "Speed", unit: "tokens per second", read: value("tokens_per_s") },
    { title: "Step efficiency", unit: "predicted share of ranks busy", read: value("step_efficiency") },
    { title: "Data wait", unit: "seconds per step", read: value("data_wait_s") },
    { title: "Peak memory", unit: "GiB, first rank", read: value("peak_memory_bytes", 1 / GIB) },
    { title: "Rerouted picks", unit: "% in recomputation", read: value("rerouted", 100) },
    { title: "Cache hits", unit: "share of reads, from Redis", read: hits },
  ]],
];

function plain(name) {
  return name.replaceAll("_", " ");
}

// `a_heads.2048x512` produces A of the layers with 2,048 inputs and 512 outputs.
function group(name) {
  const [, side, layers] = /^([ab])_heads\.(.*)$/.exec(name) ?? [];
  return side ? `${side.toUpperCase()} ${layers}` : plain(name);
}

function worth(line) {
  return Object.fromEntries(Object.entries(line.conditioning ?? {}).map(([split, { gain }]) => [plain(split), gain?.mean]));
}

// Without a hot tier there are no reads to count.
function hits({ hot_hits: found, hot_misses: missed }) {
  return found + missed > 0 ? { "": found / (found + missed) } : {};
}

export class Curves {
  constructor(parent) {
    this.steps = new Steps();
    this.sections = SECTIONS.map(([title, shown]) => {
      const section = document.createElement("section");
      section.hidden = true;
      const heading = document.createElement("h2");
      const grid = document.createElement("div");
      heading.textContent = title;
      grid.className = "charts";
      const charts = shown.map((what) => ({ ...what, chart: new Chart(this.steps, what), series: new Map() }));
      grid.append(...charts.map(({ chart }) => chart.figure));
      section.append(heading, grid);
      parent.append(section);
      return { section, charts };
    });
    this.charts = this.sections.flatMap(({ charts }) => charts);
    let width = 0;
    new ResizeObserver(() => {
      if (width !== parent.clientWidth) for (const { chart } of this.charts) chart.draw();
      width = parent.clientWidth;
    }).observe(parent);
    this.forget();
  }

  forget() {
    this.hasChanged = true;
    this.skipped = [];
    this.low = Infinity;
    this.high = -Infinity;
    for (const { series } of this.charts) series.clear();
  }

  add(lines) {
    this.hasChanged ||= lines.length > 0;
    for (const line of lines) {
      this.low = Math.min(this.low, line.step);
      this.high = Math.max(this.high, line.step);
      if (line.skipped) this.skipped.push(line.step);
      for (const { read, series } of this.charts) {
        for (const [name, y] of Object.entries(read(line))) {
          if (y !== null && !Number.isFinite(y)) continue;
          if (!series.has(name)) series.set(name, []);
          series.get(name).push([line.step, y]);
        }
      }
    }
  }

  // Draw if there are new lines.
  show() {
    if (!this.hasChanged) return;
    this.hasChanged = false;
    this.steps.cover(this.low <= this.high ? this.low : 0, this.high);
    for (const { section, charts } of this.sections) {
      // Show the figure before drawing it, because a hidden one has no width.
      section.hidden = !charts.some(({ series }) => series.size);
      for (const { chart, series, hasMarks } of charts) {
        chart.show([...series].sort(([a], [b]) => order(a, b)), hasMarks ? this.skipped : []);
      }
    }
  }
}

// Sort A before B of the same group of layers, and names without a group last.
function order(a, b) {
  const key = (name) => name.replace(/^([AB]) (.*)$/, "0 $2 $1").replace(/^(?!0 )/, "1 ");
  return key(a) < key(b) ? -1 : 1;
}
