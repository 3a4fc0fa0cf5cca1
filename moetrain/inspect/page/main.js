// Puts the page together and keeps all of it at one layer.

const get = (name) => document.getElementById(name);
const { text, corpus } = page;
const layers = [...new Set([...(text ? text.layers : []), ...(corpus ? corpus.layers : [])].map((one) => one.layer))];
const at = (part, layer) => part.layers.find((one) => one.layer === layer);
const canvas = get("logits");
let room = null;

function build() {
  for (const layer of layers) element("option", get("layer"), String(layer)).value = String(layer);
  get("layer").addEventListener("change", render);
  get("controls").hidden = layers.length === 0;
  get("text").hidden = text === null;
  get("corpus").hidden = corpus === null;
  get("walk").hidden = page.walk === null;
  if (page.walk !== null) get("steps").textContent = page.walk;
  if (corpus !== null) {
    get("sample").textContent = `${corpus.source}: ${number(corpus.num_tokens, 0)} validation tokens, loss ` +
      `${number(corpus.loss, 3)} nats. Load is over the fair share. Lift: share of the expert's tokens over share of ` +
      `all; tokens that came to the expert fewer than ${corpus.min_count} times are left out.`;
  }
  hover(canvas, (x, y) => {
    const cell = room === null ? null : logitAt(room, x, y);
    return cell === null ? null : describeLogit(text.tokens, at(text, chosen()), cell);
  });
}

const chosen = () => Number(get("layer").value);

function describeText(layer) {
  const choices = layer.routes.flatMap((route) => route.choices);
  const dropped = choices.filter((choice) => !choice.kept).length;
  const room = layer.capacity === null ? "no limit" : `${layer.capacity} slots each, ${dropped} of ${choices.length} choices dropped`;
  return `${layer.num_experts} experts, ${room}`;
}

function render() {
  if (text !== null) {
    const layer = at(text, chosen());
    get("about").textContent = describeText(layer);
    renderRibbon(get("ribbon"), text.tokens, layer);
    renderExperts(get("experts"), layer);
    room = drawLogits(canvas, text.tokens, layer);
  }
  if (corpus !== null) {
    const layer = at(corpus, chosen());
    get("measures").textContent = describeLayer(layer);
    renderProfiles(get("profiles"), layer, page.corpus.domains);
  }
}

build();
render();
window.addEventListener("resize", render);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
