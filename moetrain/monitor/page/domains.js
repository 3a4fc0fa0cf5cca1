// Heat-map domain x expert of one layer: how often the domain's tokens choose an expert, over how often all tokens do.

const DOMAIN_LEFT = 120;
const LONGEST_NAME = 18;

for (const run of page.runs) {
  for (const counted of run.domains.windows) counted.assigned = unpack(counted.assigned);
}

function clipped(name) {
  return name.length > LONGEST_NAME ? `${name.slice(0, LONGEST_NAME - 1)}…` : name;
}

// The newest window that is not after the step; before the first one, the first.
function domainWindow(run, step) {
  const before = run.domains.windows.filter((counted) => counted.step <= step);
  return before.length > 0 ? before[before.length - 1] : run.domains.windows[0];
}

function buildDomains(part, box) {
  const { names, windows } = part.run.domains;
  if (windows.length === 0) return;
  element("h3", box, "Domain (down) and expert (across), times the share of all tokens");
  const label = element("label", element("p", box, "", "hint"), "layer ");
  part.domainLayer = element("select", label);
  for (const layer of windows[0].layers) element("option", part.domainLayer, String(layer));
  part.domainLayer.value = String(windows[0].layers[0]);
  part.domainLayer.addEventListener("change", render);
  part.domainText = element("span", label);
  part.domains = element("canvas", element("div", box));
  part.domains.setAttribute("role", "img");
  hover(part.domains, (x, y) => {
    const cell = cellAt(part.domainRoom, x, y);
    return cell === null ? null : describeDomain(domainCell(part.domainShown, cell.row, cell.column), names[cell.row], cell);
  });
}

// The counts of one layer, with their sums by domain and by expert.
function domainLayer(counted, index, numDomains) {
  const experts = counted.assigned.length / counted.layers.length / numDomains;
  const counts = counted.assigned.slice(index * numDomains * experts, (index + 1) * numDomains * experts);
  const byDomain = Array(numDomains).fill(0), byExpert = Array(experts).fill(0);
  counts.forEach((count, at) => { byDomain[Math.floor(at / experts)] += count; byExpert[at % experts] += count; });
  return { experts, counts, byDomain, byExpert, scale: counted.scale };
}

function domainCell(shown, row, column) {
  const count = shown.counts[row * shown.experts + column];
  const all = shown.byDomain.reduce((sum, one) => sum + one, 0);
  const whole = all === 0 ? 0 : shown.byExpert[column] / all;
  const share = shown.byDomain[row] === 0 ? null : count / shown.byDomain[row];
  return { assigned: count * shown.scale, share, lift: share === null || whole === 0 ? null : share / whole };
}

function describeDomain(one, name, cell) {
  if (one.share === null) return `${name}\nno token of it came to this layer`;
  const lift = one.lift === null ? "no token chose this expert" : `${number(one.lift)} times as often as all tokens`;
  return `${name}, expert ${cell.column}\n${lift}\n${number(100 * one.share, 1)} % of its ` +
    `assignments, ${number(one.assigned, 0)}`;
}

function renderDomains(part, step) {
  if (!part.domains) return;
  const names = part.run.domains.names;
  const counted = domainWindow(part.run, step);
  const index = counted.layers.map(String).indexOf(part.domainLayer.value);
  const shown = part.domainShown = domainLayer(counted, index, names.length);
  const told = counted.divergences[index];
  part.domainText.textContent = ` at step ${counted.step}, domain divergence ` +
    `${number(told)} (0: all domains are routed alike, 1: no two share an expert)`;
  const room = part.domainRoom = grid(names.length, shown.experts, part.domains.parentNode.clientWidth, 520, DOMAIN_LEFT);
  const { pen } = paper(part.domains, room.height);
  const colours = theme();
  names.forEach((_, row) => shown.byExpert.forEach((_, column) => {
    fillCell(pen, room, row, column, loadColour(domainCell(shown, row, column).lift, colours));
  }));
  outline(pen, room, colours);
  labelRows(pen, room, names.map(clipped), colours);
  labelColumns(pen, room, (column) => column, colours);
  part.domains.setAttribute("aria-label", `domains and experts of layer ${part.domainLayer.value} at step ${counted.step}`);
}
