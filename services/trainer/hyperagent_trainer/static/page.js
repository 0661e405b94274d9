// The page: a list of runs, and of the chosen one its state and its curves.

import { Chart } from "./chart.js";
import { forgetToken, get, hasToken, keepToken, Refused } from "./client.js";
import { duration, number } from "./numbers.js";

const POLL_MS = 2000;
const STARTING = ["queued", "loading"];
const ENDED = ["stopped", "failed", "done"];

const byId = (id) => document.getElementById(id);

// Of a line of the metrics, the values by series; a line or a run that lacks a field adds nothing.
const value = (field) => (line) => ({ "": line[field] });
const CHARTS = [
  ["Loss", "nats per token", value("loss")],
  ["Held-out KL", "nats per token", (line) => line.held_out_kl ?? {}],
  ["Speed", "tokens per second", value("tokens_per_s")],
  ["Gradient norm", "before clipping", value("grad_norm")],
  ["Step efficiency", "share of a step that no rank waits", value("step_efficiency")],
  ["Data wait", "seconds per step", value("data_wait_s")],
  ["Cache hits", "share of reads", (line) => ({ "": line.hot_hits / (line.hot_hits + line.hot_misses) })],
].map(([title, unit, read]) => ({ chart: new Chart(title, unit), read, series: new Map() }));

let since = 0;
let shownRun = null;
let shownState = null;

function chosen(runs) {
  const wanted = location.hash.slice(1);
  return runs.find((run) => run.id === wanted) ?? runs[0];
}

function forgetCurves() {
  since = 0;
  for (const { series } of CHARTS) series.clear();
}

function add(lines) {
  for (const line of lines) {
    for (const { read, series } of CHARTS) {
      for (const [name, y] of Object.entries(read(line))) {
        if (!Number.isFinite(y) || !Number.isFinite(line.step)) continue;
        if (!series.has(name)) series.set(name, []);
        series.get(name).push([line.step, y]);
      }
    }
  }
}

function listed(run, isChosen) {
  const item = document.createElement("li");
  const link = document.createElement("a");
  const name = document.createElement("b");
  const when = document.createElement("small");
  link.href = `#${run.id}`;
  link.setAttribute("aria-current", String(isChosen));
  name.textContent = run.recipe;
  when.textContent = `${started(run.id)} · `;
  link.append(name, when, stateOf(document.createElement("span"), run.state));
  item.append(link);
  return item;
}

// An id is when the run was started, UTC: 20260131-235959-123456.
function started(id) {
  const [, y, mo, d, h, mi, s] = /^(\d{4})(\d\d)(\d\d)-(\d\d)(\d\d)(\d\d)/.exec(id);
  return new Date(Date.UTC(y, mo - 1, d, h, mi, s)).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

function stateOf(node, state) {
  node.className = "state";
  node.dataset.state = state;
  node.textContent = state;
  return node;
}

function showList(runs, current) {
  byId("no-runs").hidden = runs.length > 0;
  const focused = document.activeElement?.getAttribute("href");
  byId("list").replaceChildren(...runs.map((run) => listed(run, run === current)));
  // The list is made anew each time; whoever walks it by keyboard stays where they are.
  if (focused) [...document.querySelectorAll("nav a")].find((link) => link.getAttribute("href") === focused)?.focus();
}

function showStatus(run) {
  byId("recipe").textContent = run.recipe;
  stateOf(byId("state"), run.state);
  byId("reason").textContent = run.reason;
  byId("progress").max = run.num_steps;
  byId("progress").value = run.step;
  const parts = [`step ${number(run.step)} of ${number(run.num_steps)}`, `${Math.floor((100 * run.step) / run.num_steps)} %`];
  if (run.eta_s !== null && run.state === "running") parts.push(`${duration(run.eta_s)} left`);
  byId("progress-text").textContent = parts.join(" · ");
  const facts = [["Run", run.id], ["Files", run.folder], ["Last word", new Date(run.updated_at * 1000).toLocaleString()]];
  if (run.skipped_steps) facts.push(["Steps skipped", number(run.skipped_steps)]);
  for (const [split, verdict] of Object.entries(run.conditioning)) facts.push([`Own prompt, ${split.replaceAll("_", " ")}`, verdict]);
  byId("facts").replaceChildren(
    ...facts.map(([name, text]) => {
      const fact = document.createElement("div");
      const term = document.createElement("dt");
      const detail = document.createElement("dd");
      term.textContent = name;
      detail.textContent = text;
      fact.append(term, detail);
      return fact;
    }),
  );
}

async function showCurves(run) {
  for (;;) {
    const { metrics, next } = await get(`/v1/runs/${encodeURIComponent(run.id)}/metrics?since=${since}`);
    if (shownRun !== run.id) return;
    add(metrics);
    since = next;
    if (!metrics.length) break;
  }
  for (const { chart, series } of CHARTS) chart.show([...series]);
}

async function refresh() {
  const { runs } = await get("/v1/runs");
  const run = chosen(runs);
  byId("runs").hidden = false;
  byId("run").hidden = run === undefined;
  showList(runs, run);
  if (run === undefined) return;
  // A resumed run does the steps after its checkpoint again: once it has started, its lines are others.
  const isOther = run.id !== shownRun;
  const hasRestarted = STARTING.includes(shownState) && !STARTING.includes(run.state);
  if (isOther || hasRestarted) forgetCurves();
  const isOver = ENDED.includes(run.state) && shownState === run.state && !isOther;
  shownRun = run.id;
  showStatus(run);
  if (!isOver) await showCurves(run);
  shownState = run.state;
}

function notice(text) {
  byId("notice").hidden = text === "";
  byId("notice").textContent = text;
}

function askForToken(text) {
  forgetToken();
  byId("runs").hidden = true;
  byId("sign-in").hidden = false;
  byId("token").focus();
  notice(text);
}

let timer = 0;
let isRefreshing = false;
let isWanted = false;

async function poll() {
  clearTimeout(timer);
  if (isRefreshing) isWanted = true;
  if (isRefreshing || !hasToken()) return;
  isRefreshing = true;
  isWanted = false;
  try {
    if (!document.hidden) await refresh();
    notice("");
  } catch (error) {
    if (error instanceof Refused) return askForToken("The service refused this token; look at the one it was started with.");
    notice(error instanceof TypeError ? "The service does not answer; trying again." : error.message);
  } finally {
    isRefreshing = false;
  }
  timer = setTimeout(poll, isWanted ? 0 : POLL_MS);
}

byId("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken(byId("token").value.trim());
  byId("token").value = "";
  byId("sign-in").hidden = true;
  poll();
});
addEventListener("hashchange", poll);
document.addEventListener("visibilitychange", () => {
  // A restart may have been missed.
  shownRun = null;
  poll();
});
addEventListener("resize", () => CHARTS.forEach(({ chart }) => chart.draw()));
byId("charts").append(...CHARTS.map(({ chart }) => chart.figure));
if (hasToken()) poll();
else askForToken("");
