// The text: tokens in the colours of their experts, and the logits as a heat-map of tokens x experts.

const GOLDEN_DEGREES = 360 * 0.381966;
const TOKEN_ROOM = 110;
const EXPERT_AXIS = 20;

// The same as in the terminal (colours.py).
function expertColour(expert) {
  return `hsl(${(expert * GOLDEN_DEGREES) % 360} 62% ${expert % 2 === 0 ? 80 : 65}%)`;
}

function describeRoute(text, place, route) {
  const head = `token ${place}: ${text}`;
  if (route === undefined) return `${head}\npassed this layer by`;
  const lines = route.choices.map((choice) => {
    const where = choice.kept ? `slot ${choice.slot}` : `dropped (place ${choice.slot} in the queue)`;
    return `expert ${choice.expert}: weight ${number(choice.weight, 3)}, ${where}`;
  });
  if (route.identity > 0) lines.push(`itself: weight ${number(route.identity, 3)}`);
  return [head, ...(lines.length > 0 ? lines : ["chose no expert"])].join("\n");
}

function renderRibbon(box, tokens, layer) {
  box.replaceChildren();
  const routes = new Map(layer.routes.map((route) => [route.place, route]));
  tokens.forEach((text, place) => {
    const route = routes.get(place);
    const choices = route === undefined ? [] : route.choices;
    const kept = choices.filter((choice) => choice.kept).length;
    const kind = choices.length === 0 ? "by" : kept === choices.length ? "" : kept > 0 ? "some" : "none";
    const span = element("span", box, text, kind);
    if (choices.length > 0) span.style.background = expertColour(choices[0].expert);
    span.addEventListener("pointermove", (event) => showTip(event, describeRoute(text, place, route)));
    span.addEventListener("pointerleave", () => { tip.hidden = true; });
    box.append(document.createElement("wbr"));
  });
}

// How many of the text's tokens chose each expert, those that nobody chose left out.
function renderExperts(box, layer) {
  const counts = new Map();
  for (const choice of layer.routes.flatMap((route) => route.choices)) {
    counts.set(choice.expert, (counts.get(choice.expert) || 0) + 1);
  }
  box.replaceChildren();
  for (const [expert, count] of [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0])) {
    const key = element("span", box);
    element("i", key).style.background = expertColour(expert);
    key.append(`expert ${expert}: ${count}`);
  }
}

function logitRoom(canvas, layer) {
  const rows = layer.routes.length;
  const wide = Math.min((canvas.parentNode.clientWidth - TOKEN_ROOM) / layer.num_experts, 64);
  const high = rows > 200 ? 6 : 18;
  return { rows, columns: layer.num_experts, wide, high, height: rows * high + EXPERT_AXIS };
}

function logitAt(room, x, y) {
  const row = Math.floor(y / room.high), column = Math.floor((x - TOKEN_ROOM) / room.wide);
  return row >= 0 && row < room.rows && column >= 0 && column < room.columns ? { row, column } : null;
}

// A softmax does not see what all logits of a token have in common, so the colours leave it out.
function centred(logits) {
  const mean = logits.reduce((sum, logit) => sum + logit, 0) / logits.length;
  return logits.map((logit) => logit - mean);
}

function drawLogits(canvas, tokens, layer) {
  const room = logitRoom(canvas, layer);
  const { pen } = paper(canvas, room.height);
  const colours = theme();
  const rows = layer.routes.map((route) => centred(route.logits));
  const most = Math.max(...rows.map((row) => Math.max(...row.map(Math.abs))), 1e-9);
  layer.routes.forEach((route, row) => {
    const top = row * room.high;
    rows[row].forEach((logit, expert) => {
      const left = Math.round(TOKEN_ROOM + expert * room.wide), right = Math.round(TOKEN_ROOM + (expert + 1) * room.wide);
      pen.fillStyle = loadColour(1 + logit / most, colours);
      pen.fillRect(left, top, right - left, room.high);
    });
    drawChoices(pen, room, route, top, colours);
  });
  labelLogits(pen, room, tokens, layer, colours);
  return room;
}

function drawChoices(pen, room, route, top, colours) {
  const size = Math.max(1, Math.min(room.high, room.wide) / 2 - 3);
  pen.fillStyle = pen.strokeStyle = colours.ink;
  pen.lineWidth = 1.5;
  for (const choice of route.choices) {
    pen.beginPath();
    pen.arc(TOKEN_ROOM + (choice.expert + 0.5) * room.wide, top + room.high / 2, Math.min(size, 4), 0, 2 * Math.PI);
    if (choice.kept) pen.fill();
    else pen.stroke();
  }
}

function labelLogits(pen, room, tokens, layer, colours) {
  pen.strokeStyle = colours.line;
  pen.lineWidth = 1;
  pen.strokeRect(TOKEN_ROOM - 0.5, 0.5, room.columns * room.wide, Math.max(room.rows * room.high - 1, 0));
  pen.fillStyle = colours.muted;
  pen.textAlign = "right";
  const every = Math.ceil(12 / room.high);
  for (let row = 0; row < room.rows; row += every) {
    const text = tokens[layer.routes[row].place];
    const cut = text.length > 14 ? `${text.slice(0, 13)}…` : text;
    pen.fillText(cut, TOKEN_ROOM - 6, row * room.high + room.high / 2);
  }
  pen.textAlign = "center";
  let step = 1;
  while (step * room.wide < 26) step *= 2;
  for (let expert = 0; expert < room.columns; expert += step) {
    pen.fillText(String(expert), TOKEN_ROOM + (expert + 0.5) * room.wide, room.rows * room.high + EXPERT_AXIS / 2);
  }
}

function describeLogit(tokens, layer, cell) {
  const route = layer.routes[cell.row];
  const choice = route.choices.find((one) => one.expert === cell.column);
  const logit = `logit ${number(route.logits[cell.column], 3)}`;
  const head = `token ${route.place}: ${tokens[route.place]}\nexpert ${cell.column}: ${logit}`;
  if (choice === undefined) return head;
  return `${head}\nweight ${number(choice.weight, 3)}, ${choice.kept ? `slot ${choice.slot}` : "dropped"}`;
}
