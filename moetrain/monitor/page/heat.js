// Heat-maps: layer x expert of one window, and rank x window of the whole run.

const LEFT = 34;
const AXIS = 20;
const HALF_LINE = 6;

// Room of a grid of rows x columns in a canvas; edges are whole pixels, gaps only between large cells.
function grid(rows, columns, width, tallest, left = LEFT) {
  const high = Math.max(4, Math.min(26, Math.floor(tallest / rows)));
  const wide = (width - left) / columns;
  return { rows, columns, left, high, wide, gap: wide >= 7 && high >= 7 ? 1 : 0, height: rows * high + AXIS };
}

function cellAt(room, x, y) {
  const row = Math.floor(y / room.high);
  const column = Math.floor((x - room.left) / room.wide);
  return row >= 0 && row < room.rows && column >= 0 && column < room.columns ? { row, column } : null;
}

function fillCell(pen, room, row, column, colour) {
  const left = Math.round(room.left + column * room.wide);
  const right = Math.round(room.left + (column + 1) * room.wide);
  pen.fillStyle = colour;
  pen.fillRect(left, row * room.high, right - left - room.gap, room.high - room.gap);
}

// Fair is nearly the colour of the paper, so the whole needs an edge.
function outline(pen, room, colours) {
  pen.strokeStyle = colours.line;
  pen.strokeRect(room.left - 0.5, 0.5, room.columns * room.wide, room.rows * room.high - 0.5);
}

function labelRows(pen, room, names, colours) {
  const every = Math.ceil(12 / room.high);
  pen.fillStyle = colours.muted;
  pen.textAlign = "right";
  for (let row = 0; row < room.rows; row += every) {
    pen.fillText(String(names[row]), room.left - 6, Math.max(row * room.high + room.high / 2, HALF_LINE));
  }
}

function labelColumns(pen, room, name, colours) {
  let every = 1;
  while (every * room.wide < 30) every *= 2;
  pen.fillStyle = colours.muted;
  pen.textAlign = "center";
  for (let column = 0; column < room.columns; column += every) {
    pen.fillText(String(name(column)), room.left + (column + 0.5) * room.wide, room.rows * room.high + AXIS / 2);
  }
}

// One expert of one layer: what was assigned, kept, the load over the fair share and the part that was dropped.
function cellOf(load, row, column) {
  const at = row * load.experts + column;
  const assigned = load.assigned[at], kept = load.kept[at], sum = load.sums[row];
  return {
    assigned: assigned * load.scale,
    kept: kept * load.scale,
    relative: sum === 0 ? null : (assigned * load.experts) / sum,
    dropped: assigned === 0 ? null : 1 - kept / assigned,
  };
}

function drawHeat(canvas, load, mode) {
  const rows = load.layers.length;
  const room = grid(rows, load.experts, canvas.parentNode.clientWidth, 520);
  const { pen } = paper(canvas, room.height);
  const colours = theme();
  for (let row = 0; row < rows; row++) {
    for (let e = 0; e < load.experts; e++) {
      const one = cellOf(load, row, e);
      const colour = mode === "load" ? loadColour(one.relative, colours) : dropColour(one.dropped, colours);
      fillCell(pen, room, row, e, colour);
    }
  }
  outline(pen, room, colours);
  labelRows(pen, room, load.layers, colours);
  labelColumns(pen, room, (column) => column, colours);
  return room;
}

function describeCell(load, cell) {
  const one = cellOf(load, cell.row, cell.column);
  const about = load.scale > 1 ? "about " : "";
  const share = one.relative === null ? "no token came to this layer" : `load ${number(one.relative)} of the fair share`;
  const dropped = one.dropped === null ? "none assigned" : `dropped ${number(100 * one.dropped, 1)} %`;
  return `layer ${load.layers[cell.row]}, expert ${cell.column}\n${share}\n` +
    `${about}${number(one.assigned, 0)} assigned, ${number(one.kept, 0)} kept\n${dropped}`;
}

function drawRanks(canvas, loads, chosen) {
  const ranks = loads[chosen].ranks.length;
  const room = grid(ranks, loads.length, canvas.parentNode.clientWidth, 200);
  room.gap = 0;
  const { pen } = paper(canvas, room.height);
  const colours = theme();
  loads.forEach((load, column) => {
    if (load.ranks.length !== ranks) return;
    load.ranks.forEach((relative, row) => fillCell(pen, room, row, column, loadColour(relative, colours)));
  });
  outline(pen, room, colours);
  labelRows(pen, room, [...Array(ranks).keys()], colours);
  pen.textAlign = "left";
  pen.fillText(`step ${loads[0].step}`, room.left, room.rows * room.high + AXIS / 2);
  pen.textAlign = "right";
  pen.fillText(`step ${loads[loads.length - 1].step}`, room.left + room.columns * room.wide, room.rows * room.high + AXIS / 2);
  pen.strokeStyle = colours.ink;
  const wide = Math.max(Math.round(room.wide), 3);
  const left = Math.min(Math.round(room.left + chosen * room.wide), Math.round(room.left + room.columns * room.wide) - wide);
  pen.strokeRect(left + 0.5, 0.5, wide - 1, room.rows * room.high - 1);
  return room;
}

function describeRank(loads, cell) {
  const load = loads[cell.column];
  if (cell.row >= load.ranks.length) return null;
  return `step ${load.step}, rank ${cell.row}\n${number(load.ranks[cell.row])} of the mean over ranks`;
}
