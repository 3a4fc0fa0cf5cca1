// Puts the page together and keeps all of it at one step.

const runs = page.runs;
const comparing = runs.length > 1;
const steps = [...new Set(runs.flatMap((run) => run.loads.map((load) => load.step)))].sort((a, b) => a - b);
const lastStep = Math.max(0, ...runs.flatMap((run) => run.charts.flatMap((chart) => chart.curves)
  .flatMap((curve) => curve.points.map((point) => point[0]))), ...steps);
const shown = { index: Math.max(steps.length - 1, 0), mode: "load" };
const slider = document.getElementById("step");

const HEAD = ["layer", "busiest expert", "least busy", "effective experts", "dead", "dropped", "busiest rank"];
const letter = (index) => (comparing ? `${"AB"[index]}: ` : "");

function build() {
  slider.max = String(Math.max(steps.length - 1, 0));
  slider.value = String(shown.index);
  slider.disabled = steps.length < 2;
  slider.addEventListener("input", () => choose(Number(slider.value)));
  for (const radio of document.getElementsByName("mode")) {
    radio.addEventListener("change", () => { shown.mode = radio.value; render(); });
  }
  const parts = runs.map(buildRun);
  const charts = buildCharts();
  runs.forEach((run, index) => { buildEvents(run, index); buildFacts(run, index); });
  if (comparing) document.getElementById("dashes").textContent = " Full lines are run A, dashed ones run B.";
  return { parts, charts };
}

function buildRun(run, index) {
  const box = element("article", document.getElementById("runs"));
  const part = { run, heading: element("h2", box, letter(index) + run.id), state: element("p", box, "", "hint") };
  if (run.note !== "") element("p", box, run.note, "hint");
  if (run.loads.length === 0) return part;
  element("h3", box, "Layer (down) and expert (across)");
  part.heat = element("canvas", element("div", box));
  part.heat.setAttribute("role", "img");
  hover(part.heat, (x, y) => {
    const cell = cellAt(part.room, x, y);
    return cell === null ? null : describeCell(part.load, cell);
  });
  buildDomains(part, box);
  if (run.loads.some((load) => load.ranks.length > 1)) buildRanks(part, box);
  part.bars = element("div", box, "", "drops");
  element("h3", box, "Layer by layer, times the fair share");
  const table = element("table", element("div", box, "", "scroll"));
  const head = element("tr", element("thead", table));
  for (const name of HEAD) element("th", head, name);
  part.body = element("tbody", table);
  return part;
}

function buildRanks(part, box) {
  const received = part.run.loads.some((load) => load.received);
  element("h3", box, received ? "Rows received by each rank (down), over the run (across)"
    : "Assigned to each expert-parallel rank (down), over the run (across), before dropping");
  part.ranks = element("canvas", element("div", box));
  part.ranks.setAttribute("role", "img");
  part.ranks.setAttribute("aria-label", "load of each rank over the run");
  hover(part.ranks, (x, y) => {
    const cell = cellAt(part.rankRoom, x, y);
    return cell === null ? null : describeRank(part.run.loads, cell);
  });
}

function buildCharts() {
  const titles = runs[0].charts.map((chart) => chart.title);
  return titles.map((title, at) => buildChart(title, at)).filter((chart) => chart !== null);
}

function buildChart(title, at) {
  const lines = runs.flatMap((run, index) => run.charts[at].curves.map((curve) => ({
    ...curve, name: letter(index) + curve.label, dashed: index === 1, colour: curve.colour,
  })));
  if (lines.length === 0) return null;
  const figure = element("figure", document.getElementById("charts"));
  element("figcaption", figure, title);
  const keys = element("div", figure, "", "keys");
  const labels = [...new Map(lines.map((line) => [line.label, line])).values()];
  for (const line of labels) {
    const key = element("span", keys);
    element("i", key).style.background = `var(--curve-${line.colour + 1})`;
    key.append(line.label);
  }
  const canvas = element("canvas", element("div", figure));
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", title);
  const chart = { canvas, lines, floor: runs[0].charts[at].floor };
  const inside = (x) => x >= chart.axes.left - 4 && x <= chart.axes.right + 4;
  hover(canvas, (x) => (inside(x) ? describeCurves(lines, stepAt(chart.axes, x)) : null));
  canvas.addEventListener("click", (event) => {
    const x = event.clientX - canvas.getBoundingClientRect().left;
    if (inside(x) && steps.length > 0) choose(nearestIndex(stepAt(chart.axes, x)));
  });
  return chart;
}

function nearestIndex(step) {
  let best = 0;
  steps.forEach((one, index) => { if (Math.abs(one - step) < Math.abs(steps[best] - step)) best = index; });
  return best;
}

function buildEvents(run, index) {
  const box = element("div", document.getElementById("events"));
  if (comparing) element("h3", box, letter(index) + run.id);
  if (run.events.length === 0) element("p", box, "Nothing was recorded.", "hint");
  if (run.events_left_out > 0) element("p", box, `${run.events_left_out} earlier events are left out.`, "hint");
  if (run.events.length === 0) return;
  const table = element("table", element("div", box, "", "scroll"), "", "words");
  const head = element("tr", element("thead", table));
  for (const name of ["step", "what", "message"]) element("th", head, name);
  const body = element("tbody", table);
  for (const event of run.events) {
    const row = element("tr", body, "", event.undone ? "undone" : "");
    if (event.undone) row.title = "the run was later taken up before this step";
    for (const value of [event.step, event.kind, event.message]) element("td", row, String(value));
  }
}

function buildFacts(run, index) {
  const box = element("div", document.getElementById("facts"));
  if (comparing) element("h3", box, letter(index) + run.id);
  const body = element("tbody", element("table", box, "", "words"));
  for (const [name, value] of run.facts) {
    const row = element("tr", body);
    element("th", row, name);
    element("td", row, value);
  }
}

// The newest window of a run that is not after the step; before its first one, the first.
function windowAt(run, step) {
  let at = 0;
  run.loads.forEach((load, index) => { if (load.step <= step) at = index; });
  return at;
}

function renderRun(part, step) {
  part.state.textContent = part.run.state;
  if (part.run.loads.length === 0) return;
  const at = windowAt(part.run, step);
  const load = part.load = part.run.loads[at];
  part.state.textContent = `steps ${load.step - load.num_steps + 1} to ${load.step}, ` +
    `${short(load.tokens)} tokens since the start; ${part.run.state}`;
  part.room = drawHeat(part.heat, load, shown.mode);
  part.heat.setAttribute("aria-label", `${shown.mode} of each expert of each layer at step ${load.step}`);
  renderDomains(part, step);
  if (part.ranks) part.rankRoom = drawRanks(part.ranks, part.run.loads, at);
  part.bars.replaceChildren();
  renderBars(part.bars, "Dropped, by rank of the choice", load.choice, (i) => `choice ${i + 1}`);
  renderBars(part.bars, "Dropped, by position in the sequence", load.position, (i, n) => `part ${i + 1} of ${n}`);
  renderTable(part.body, load);
}

function renderBars(box, title, dropped, name) {
  if (dropped === null) return;
  const part = element("div", box);
  element("h3", part, title);
  const bars = element("div", part, "", "bars");
  dropped.forEach((percent, i) => {
    element("span", bars, name(i, dropped.length));
    element("b", bars).style.width = `${percent || 0}%`;
    element("span", bars, percent === null ? "none assigned" : `${number(percent, 1)} %`);
  });
}

function renderTable(body, load) {
  body.replaceChildren();
  load.table.forEach(([most, least, effective, dead, dropped, rank, rankLoad, expert], at) => {
    const row = element("tr", body);
    const busiest = rankLoad === null || load.ranks.length < 2 ? "-" : `${number(rankLoad)} (rank ${rank})`;
    const percent = dropped === null ? "none" : `${number(dropped, 1)} %`;
    const first = most === null ? "none" : `${number(most)} (expert ${expert})`;
    const cells = [load.layers[at], first, number(least), number(effective, 1), dead, percent, busiest];
    for (const value of cells) element("td", row, String(value));
  });
}

function renderScale() {
  const colours = theme();
  const css = (name) => between(colours[name], colours[name], 0);
  const load = shown.mode === "load";
  const stops = load ? ["starved", "fair", "overloaded"] : ["nothing", "all"];
  document.querySelector("#scale i").style.background = `linear-gradient(90deg, ${stops.map(css).join(", ")})`;
  document.getElementById("scale-low").textContent = load ? "0" : "0 %";
  document.getElementById("scale-high").textContent = load ? "2 or more; the middle is the fair share" : "50 % or more";
}

function choose(index) {
  shown.index = index;
  slider.value = String(index);
  render();
}

function render() {
  const step = steps.length > 0 ? steps[shown.index] : lastStep;
  document.getElementById("step-text").textContent = String(step);
  slider.setAttribute("aria-valuetext", `step ${step}`);
  renderScale();
  for (const part of built.parts) renderRun(part, step);
  for (const chart of built.charts) chart.axes = drawChart(chart.canvas, chart.lines, chart.floor, lastStep, step);
}

const built = build();
render();
window.addEventListener("resize", render);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
