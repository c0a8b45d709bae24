// Curves as inline SVG; the pointer, or the arrow keys, read their values.

const MOST_ROWS = 100; // of a table of values
const CHART = { width: 380, height: 210, left: 50, right: 10, top: 10, bottom: 24 };

function niceTicks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= raw);
  const ticks = [];
  const last = Math.floor(high / step + 1e-6);
  for (let i = Math.ceil(low / step - 1e-6); i <= last; i++) ticks.push(i * step);
  return ticks;
}

function powerTicks(low, high) {
  const every = Math.ceil((Math.log10(high) - Math.log10(low)) / 5) || 1;
  const ticks = [];
  for (let e = Math.ceil(Math.log10(low) - 1e-9); 10 ** e <= high * 1.0001; e += every) {
    ticks.push(10 ** e);
  }
  return ticks;
}

// Where values stand on the page: {place(value), ticks}.
function verticalScale(values, isLog) {
  const { height, top, bottom } = CHART;
  let low = Math.min(...values), high = Math.max(...values);
  if (isLog) {
    low = 10 ** Math.floor(Math.log10(low) + 1e-9);
    high = Math.max(10 ** Math.ceil(Math.log10(high) - 1e-9), low * 10);
  } else {
    // Values that differ by rounding alone are one value.
    const margin = 0.06 * (high - low > 1e-9 * Math.abs(high) ? high - low : Math.abs(high) || 1);
    low = low >= 0 && low - margin < 0.25 * (high - low) ? 0 : low - margin;
    high += margin;
  }
  const share = isLog
    ? (v) => Math.log(v / low) / Math.log(high / low)
    : (v) => (v - low) / (high - low);
  return {
    place: (v) => height - bottom - share(v) * (height - top - bottom),
    ticks: isLog ? powerTicks(low, high) : niceTicks(low, high, 4),
  };
}

function chartCurves(chart, runs) {
  const isAlone = runs.length === 1;
  const labels = [...new Set(chart.curves.map((curve) => curve.label))];
  return chart.curves.map((curve) => {
    const place = labels.indexOf(curve.label);
    return {
      ...curve,
      points: (curve.points || []).filter((p) => !chart.is_log || p[1] > 0),
      name: isAlone ? curve.label
        : labels.length > 1 ? `${runs[curve.run].name} · ${curve.label}` : runs[curve.run].name,
      style: `curve c${(isAlone ? place : curve.run) % 8}` + (isAlone ? "" : ` d${place % 4}`),
    };
  }).filter((curve) => curve.points.length || curve.level !== undefined);
}

function drawCurve(curve, x, y) {
  const { width, left, right } = CHART;
  const group = svg("g", { class: curve.style });
  if (curve.level !== undefined) {
    const at = y(curve.level);
    group.append(svg("line", { class: "level", x1: left, x2: width - right, y1: at, y2: at }));
    return group;
  }
  const points = curve.points.map((p) => [x(p[0]), y(p[1])]);
  const banded = curve.points.filter((p) => p.length > 2);
  if (banded.length > 1) {
    const edge = [...banded.map((p) => [p[0], p[3]]), ...banded.toReversed().map((p) => [p[0], p[2]])];
    group.append(svg("polygon", { points: edge.map((p) => `${x(p[0])},${y(p[1])}`).join(" ") }));
  }
  for (const p of banded) {
    group.append(svg("line", { class: "error", x1: x(p[0]), x2: x(p[0]), y1: y(p[2]), y2: y(p[3]) }));
  }
  group.append(svg("polyline", { points: points.map((p) => p.join(",")).join(" ") }));
  if (curve.marked || points.length === 1) {
    for (const [cx, cy] of points) group.append(svg("circle", { cx, cy, r: 3 }));
  }
  return group;
}

function nearest(points, step) {
  return points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
}

function drawChart(chart, runs) {
  const { width, height, left, right, top, bottom } = CHART;
  const curves = chartCurves(chart, runs);
  if (!curves.length) return null;
  const values = curves.flatMap((c) => [...c.points.flatMap((p) => p.slice(1)), c.level ?? []].flat());
  const steps = [...new Set(curves.flatMap((c) => c.points.map((p) => p[0])))].sort((a, b) => a - b);
  const last = Math.max(...steps, 1);
  const x = (step) => left + (step / last) * (width - left - right);
  const { place: y, ticks } = verticalScale(values, chart.is_log);
  const isShare = chart.unit.startsWith("share"), axis = chart.axis ?? "step";
  const shown = (v) => (isShare ? percent(v, Math.abs(v * 100 - Math.round(v * 100)) > 0.05 ? 1 : 0) : number(v));

  const legend = el("ul", { class: "legend" });
  const readings = curves.map((curve) => {
    const reading = el("output");
    legend.append(el("li", { class: curve.style },
      svg("svg", { viewBox: "0 0 18 8", class: "key", "aria-hidden": "true" },
        svg("line", { x1: 0, x2: 18, y1: 4, y2: 4, class: curve.level === undefined ? "" : "level" })),
      curve.name, reading));
    return reading;
  });
  const cursor = svg("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  const where = el("output", { class: "where" });
  const picture = svg("svg", {
    viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img",
    "aria-label": `${chart.title}, ${chart.unit}; arrow keys read values`,
  },
  ticks.map((tick) => svg("g", { class: "tick" },
    svg("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick) }),
    svg("text", { x: left - 6, y: y(tick) + 3.5, "text-anchor": "end" }, shown(tick)))),
  niceTicks(0, last, 4).map((tick) => svg("text", {
    class: "steps", x: x(tick), y: height - 7,
    "text-anchor": x(tick) > width - 30 ? "end" : "middle",
  }, number(tick))),
  curves.map((curve) => drawCurve(curve, x, y)), cursor);

  let at = -1;
  const read = (index) => {
    at = index;
    const step = steps[index];
    cursor.setAttribute("visibility", step === undefined ? "hidden" : "visible");
    where.textContent = step === undefined ? "" : `${axis} ${step}`;
    if (step !== undefined) for (const end of ["x1", "x2"]) cursor.setAttribute(end, x(step));
    curves.forEach((curve, i) => {
      const value = curve.level ?? (step === undefined ? null : nearest(curve.points, step)[1]);
      readings[i].textContent = step === undefined ? "" : shown(value);
    });
  };
  picture.addEventListener("pointermove", (event) => {
    if (!steps.length) return;
    const box = picture.getBoundingClientRect();
    const step = ((event.clientX - box.left) / box.width * width - left) / (width - left - right) * last;
    read(steps.indexOf(nearest(steps.map((s) => [s]), step)[0]));
  });
  picture.addEventListener("pointerleave", () => read(-1));
  picture.addEventListener("blur", () => read(-1));
  picture.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    read(Math.min(steps.length - 1, Math.max(0, at + move)));
  });
  return el("figure", { class: "card chart" },
    el("figcaption", {}, el("b", {}, chart.title), el("span", {}, chart.unit), where),
    picture, legend, chartValues(curves, steps, axis, shown));
}

// The curves as a table, for whoever does not see them; made when it is first opened.
function chartValues(curves, steps, axis, shown) {
  const every = Math.ceil(steps.length / MOST_ROWS) || 1;
  const rows = steps.filter((_, i) => i % every === 0 || i === steps.length - 1);
  const at = (curve, step) => curve.level ?? curve.points.find((p) => p[0] === step)?.[1];
  const details = el("details", {}, el("summary", {}, "Values"));
  details.addEventListener("toggle", () => details.append(el("div", { class: "scroll" },
    dataTable([axis, ...curves.map((curve) => curve.name)], rows.map((step) => [
      number(step), ...curves.map((curve) => (at(curve, step) === undefined ? "–" : shown(at(curve, step)))),
    ])))), { once: true });
  return details;
}
