// Curves over steps, one small canvas a chart.

const MARGIN = { left: 48, right: 18, top: 8, bottom: 20 };
const CHART_HEIGHT = 170;

function ticks(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const every = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
  const out = [];
  for (let n = Math.ceil(low / every - 1e-9); n * every <= high + every * 1e-9; n++) out.push(n * every);
  return out;
}

// From the floor, if there is one, to the greatest value, with a little air; never empty.
function range(lines, floor) {
  let low = Infinity, high = -Infinity;
  for (const line of lines) {
    for (const [, value] of line.points) {
      if (value === null) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  }
  if (low > high) return null;
  if (floor !== null) low = Math.min(low, floor);
  const air = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
  return { low: floor !== null && low >= floor ? floor : low - air, high: high + air };
}

function drawChart(canvas, lines, floor, lastStep, chosenStep) {
  const { pen, width, height } = paper(canvas, CHART_HEIGHT);
  const colours = theme();
  const span = range(lines, floor);
  const right = width - MARGIN.right, bottom = height - MARGIN.bottom;
  const x = (step) => MARGIN.left + (step / (lastStep || 1)) * (right - MARGIN.left);
  const axes = { x, left: MARGIN.left, right, lastStep };
  pen.fillStyle = colours.muted;
  if (span === null) {
    pen.fillText("no finite value", MARGIN.left, height / 2);
    return axes;
  }
  const y = (value) => bottom - ((value - span.low) / (span.high - span.low)) * (bottom - MARGIN.top);
  drawAxes(pen, colours, axes, span, y, bottom);
  pen.strokeStyle = colours.muted;
  pen.lineWidth = 1;
  stroke(pen, [[x(chosenStep), MARGIN.top], [x(chosenStep), bottom]]);
  for (const line of lines) drawLine(pen, line, colours, x, y);
  return axes;
}

function drawAxes(pen, colours, axes, span, y, bottom) {
  pen.strokeStyle = colours.line;
  pen.lineWidth = 1;
  pen.textAlign = "right";
  for (const value of ticks(span.low, span.high, 6)) {
    const at = Math.round(y(value)) + 0.5;
    stroke(pen, [[axes.left, at], [axes.right, at]]);
    pen.fillText(short(value), axes.left - 6, at);
  }
  pen.textAlign = "center";
  for (const step of ticks(0, axes.lastStep, 5)) pen.fillText(short(step), axes.x(step), bottom + 11);
}

function drawLine(pen, line, colours, x, y) {
  pen.strokeStyle = pen.fillStyle = colours.curves[line.colour];
  pen.lineWidth = 1.75;
  pen.lineJoin = "round";
  pen.setLineDash(line.dashed ? [5, 4] : []);
  let stretch = [];
  for (const [step, value] of [...line.points, [0, null]]) {
    if (value !== null) {
      stretch.push([x(step), y(value)]);
      continue;
    }
    if (stretch.length === 1) pen.fillRect(stretch[0][0] - 2, stretch[0][1] - 2, 4, 4);
    else if (stretch.length > 1) stroke(pen, stretch);
    stretch = [];
  }
  pen.setLineDash([]);
}

function stroke(pen, points) {
  pen.beginPath();
  points.forEach(([x, y], i) => (i === 0 ? pen.moveTo(x, y) : pen.lineTo(x, y)));
  pen.stroke();
}

function stepAt(axes, x) {
  return Math.round(((x - axes.left) / (axes.right - axes.left)) * axes.lastStep);
}

function nearest(points, step) {
  let best = null;
  for (const point of points) {
    if (best === null || Math.abs(point[0] - step) < Math.abs(best[0] - step)) best = point;
  }
  return best;
}

function describeCurves(lines, step) {
  const rows = lines.filter((line) => line.points.length > 0).map((line) => {
    const [at, value] = nearest(line.points, step);
    return `${line.name}: ${value === null ? "not finite" : short(value)} at step ${at}`;
  });
  return rows.join("\n");
}
