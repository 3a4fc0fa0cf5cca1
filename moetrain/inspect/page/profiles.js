// What the experts of one layer specialise in.

const PROFILE_HEAD = ["expert", "load", "dropped", "by eighth of the sequence", "together with", "tokens by lift"];
const DOMAIN_HEAD = "domains by lift";
const TOP_DOMAINS = 3;
const EIGHTH_HEIGHT = 20;

function renderProfiles(box, layer, domains) {
  box.replaceChildren();
  const table = element("table", box);
  const head = element("tr", element("thead", table));
  for (const name of domains.length > 0 ? [...PROFILE_HEAD, DOMAIN_HEAD] : PROFILE_HEAD) element("th", head, name);
  const body = element("tbody", table);
  for (const one of layer.experts) {
    const row = element("tr", body);
    const cell = element("td", row);
    element("i", cell, "", "key").style.background = expertColour(one.expert);
    cell.append(String(one.expert));
    element("td", row, number(one.load));
    element("td", row, one.dropped === null ? "-" : `${number(100 * one.dropped, 1)} %`);
    renderEighths(element("td", row), one.positions);
    const partners = one.partners.map((partner) => `${partner.expert}: ${number(100 * partner.share, 0)} %`);
    element("td", row, partners.join(", "), "together");
    renderTopTokens(element("td", row, "", "tokens"), one.tokens);
    if (domains.length > 0) element("td", row, describeDomains(one.domains, domains));
  }
}

// Those whose tokens choose the expert most often, over how often all tokens do.
function describeDomains(lifts, names) {
  const known = lifts.map((lift, i) => ({ lift, name: names[i] })).filter((one) => one.lift !== null);
  known.sort((a, b) => b.lift - a.lift);
  return known.slice(0, TOP_DOMAINS).map((one) => `${one.name} ×${number(one.lift, 1)}`).join(", ");
}

// Bars from nothing to twice the fair share and more.
function renderEighths(cell, positions) {
  const bars = element("span", cell, "", "eighths");
  for (const load of positions) {
    element("b", bars).style.height = `${load === null ? 0 : Math.min(load / 2, 1) * EIGHTH_HEIGHT}px`;
  }
  const words = positions.map((load) => (load === null ? "none" : number(load)));
  bars.addEventListener("pointermove", (event) => showTip(event, `times the fair share:\n${words.join("  ")}`));
  bars.addEventListener("pointerleave", () => { tip.hidden = true; });
}

function renderTopTokens(cell, tokens) {
  for (const token of tokens) {
    const span = element("span", cell, token.text);
    element("small", span, `×${number(token.lift, 1)}`);
    span.addEventListener("pointermove", (event) => showTip(event, `${token.text}\nlift ${number(token.lift)}, ${token.count} times`));
    span.addEventListener("pointerleave", () => { tip.hidden = true; });
  }
}

function describeLayer(layer) {
  const parts = [];
  if (layer.entropy !== null) {
    parts.push(`router entropy ${number(layer.entropy)} of at most ${number(layer.uniform)} nats`);
  }
  if (layer.vocabulary !== null) {
    parts.push(`a token id goes to its favourite expert ${number(100 * layer.vocabulary, 0)} % of the time`);
  }
  if (layer.divergence !== null) {
    parts.push(`domain divergence ${number(layer.divergence)} (0: all domains are routed alike, 1: no two share an expert)`);
  }
  return parts.join("; ");
}
