// The data of the page, elements, colours and numbers.

const page = JSON.parse(document.getElementById("data").textContent);

function unpack(text) {
  const raw = atob(text);
  const out = new Uint16Array(raw.length / 2);
  for (let i = 0; i < out.length; i++) out[i] = raw.charCodeAt(2 * i) | (raw.charCodeAt(2 * i + 1) << 8);
  return out;
}

for (const run of page.runs) {
  for (const load of run.loads) {
    load.assigned = unpack(load.assigned);
    load.kept = load.kept === null ? load.assigned : unpack(load.kept);
    load.sums = load.layers.map((_, row) => load.assigned.slice(row * load.experts, (row + 1) * load.experts)
      .reduce((sum, count) => sum + count, 0));
  }
}

function element(name, parent, text = "", kind = "") {
  const made = document.createElement(name);
  if (text !== "") made.textContent = text;
  if (kind !== "") made.className = kind;
  parent.append(made);
  return made;
}

// A canvas as wide as its parent, sharp on any screen; returns its pen, in CSS pixels, and its size.
function paper(canvas, height) {
  const width = canvas.parentNode.clientWidth;
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  return { pen, width, height };
}

function themed(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// Read once a drawing: a style look-up for every cell would be slow.
function theme() {
  const mix = (name) => themed(name).split(" ").map(Number);
  return {
    ink: themed("ink"), muted: themed("muted"), line: themed("line"),
    curves: [themed("curve-1"), themed("curve-2"), themed("curve-3")],
    starved: mix("starved"), fair: mix("fair"), overloaded: mix("overloaded"), unknown: mix("unknown"),
    nothing: mix("nothing"), all: mix("all"),
  };
}

function between(low, high, share) {
  return `rgb(${low.map((value, i) => Math.round(value + (high[i] - value) * share)).join(",")})`;
}

// Load over fair share: 0 starved, 1 fair, 2 and above overloaded; null: no token came to this layer.
function loadColour(relative, colours) {
  if (relative === null) return between(colours.unknown, colours.unknown, 0);
  const other = relative < 1 ? colours.starved : colours.overloaded;
  return between(colours.fair, other, Math.min(Math.abs(relative - 1), 1));
}

const MOST_DROPPED = 0.5;

function dropColour(fraction, colours) {
  if (fraction === null) return between(colours.unknown, colours.unknown, 0);
  return between(colours.nothing, colours.all, Math.min(fraction / MOST_DROPPED, 1));
}

function number(value, digits = 2) {
  if (value === null) return "none";
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(3)}G`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return String(+value.toPrecision(4));
}

const tip = document.getElementById("tip");

function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 16;
  const fits = below + tip.offsetHeight < window.innerHeight;
  tip.style.left = `${Math.max(left, 4)}px`;
  tip.style.top = `${fits ? below : event.clientY - tip.offsetHeight - 10}px`;
}

// Shows what ``describe(x, y)`` says of the point under the pointer, nothing where it says null.
function hover(canvas, describe) {
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const text = describe(event.clientX - box.left, event.clientY - box.top);
    if (text === null) tip.hidden = true;
    else showTip(event, text);
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
}
