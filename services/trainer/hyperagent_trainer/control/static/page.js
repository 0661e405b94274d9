// The status page: a list of runs, and the state and curves of the selected run.

import { forgetToken, get, hasToken, keepToken, Refused } from "./client.js";
import { Curves } from "./curves.js";
import { duration, number } from "./numbers.js";

const POLL_MS = 2000;
const ENDED = ["stopped", "failed", "done"];
const START = "0";

const byId = (id) => document.getElementById(id);

function node(name, text, className = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

const curves = new Curves(byId("charts"));
let since = START;
let shownRun = null;
let shownWord = null;

function chosen(runs) {
  const wanted = location.hash.slice(1);
  return runs.find((run) => run.id === wanted) ?? runs[0];
}

function listed(run, isChosen) {
  const item = document.createElement("li");
  const link = document.createElement("a");
  link.href = `#${run.id}`;
  link.setAttribute("aria-current", String(isChosen));
  link.append(node("b", run.recipe), node("small", `${started(run.id)} · `), stateOf(document.createElement("span"), run.state));
  item.append(link);
  return item;
}

// A run's id is its start time in UTC: 20260131-235959-123456.
function started(id) {
  const [, y, mo, d, h, mi, s] = /^(\d{4})(\d\d)(\d\d)-(\d\d)(\d\d)(\d\d)/.exec(id);
  return new Date(Date.UTC(y, mo - 1, d, h, mi, s)).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

function stateOf(made, state) {
  made.className = "state";
  made.dataset.state = state;
  made.textContent = state;
  return made;
}

function showList(runs, current) {
  byId("no-runs").hidden = runs.length > 0;
  const focused = document.activeElement?.getAttribute("href");
  byId("list").replaceChildren(...runs.map((run) => listed(run, run === current)));
  // The list is rebuilt each time, so keyboard focus has to be restored.
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
  showAlarm(run);
}

// A static adapter is the same for every prompt and has no conditioning verdict; only a hypernetwork can collapse.
function showAlarm(run) {
  const isDue = run.adapters_collapsed && Object.keys(run.conditioning).length > 0;
  const alarm = byId("alarm");
  // Left unchanged unless something changes, because screen readers would read it aloud again.
  if (isDue === alarm.childElementCount > 0) return;
  alarm.replaceChildren(
    ...(isDue
      ? [
          node("strong", "The adapters have collapsed."),
          node("p", "At the last evaluation, different prompts got practically the same adapter (mean cosine above 0.98, and another repository's adapter is as good): the network ignores its prompts, and a static adapter would work equally well."),
          node("p", "Early in a run this may be temporary. If it persists in the next evaluations, stop the run, check whether the prompts of its data differ in what the student needs, and start again with a lower learning rate, or with warm_start, so that the network only learns what remains after a static adapter."),
        ]
      : []),
  );
}

function showFacts(run) {
  const facts = [["Run", run.id], ["Files", run.folder], ["Last update", new Date(run.updated_at * 1000).toLocaleString()]];
  const skipped = curves.skipped;
  if (skipped.length) facts.push(["Steps skipped", `${number(skipped.length)}, the last is ${number(skipped.at(-1))}`]);
  for (const [split, verdict] of Object.entries(run.conditioning)) facts.push([`Own prompt, ${split.replaceAll("_", " ")}`, verdict]);
  if (run.verdict) facts.push([`Verdict after step ${number(run.verdict.step)}`, `${run.verdict.verdict ?? "none"}: ${run.verdict.reason}`]);
  byId("facts").replaceChildren(
    ...facts.map(([name, text]) => {
      const fact = document.createElement("div");
      fact.append(node("dt", name), node("dd", text));
      return fact;
    }),
  );
}

async function showCurves(run) {
  for (;;) {
    const path = `/v1/runs/${encodeURIComponent(run.id)}/metrics?since=${encodeURIComponent(since)}`;
    const { metrics, next, reset } = await get(path);
    // A resumed run repeats the steps after its checkpoint, so their lines are replaced.
    if (reset) curves.forget();
    curves.add(metrics);
    since = next;
    if (!metrics.length) break;
  }
  curves.show();
}

async function refresh() {
  const { runs } = await get("/v1/runs");
  const run = chosen(runs);
  byId("runs").hidden = false;
  byId("run").hidden = run === undefined;
  showList(runs, run);
  if (run === undefined) return;
  if (run.id !== shownRun) {
    since = START;
    shownWord = null;
    curves.forget();
    // Remove another run's curves while this run's are loading.
    curves.show();
  }
  shownRun = run.id;
  showStatus(run);
  // No more data follows a final state.
  const word = `${run.state} ${run.updated_at}`;
  if (!ENDED.includes(run.state) || word !== shownWord) await showCurves(run);
  showFacts(run);
  shownWord = word;
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
    if (error instanceof Refused) return askForToken("The service refused this token; check the token that it was started with.");
    notice(error instanceof TypeError ? "The service does not answer; retrying." : error.message);
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
document.addEventListener("visibilitychange", poll);
if (hasToken()) poll();
else askForToken("");
