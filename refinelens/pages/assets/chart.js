// Line charts of the page of a run, drawn as SVG.

const CHART = { width: 430, height: 250, left: 52, right: 10, above: 12, below: 36 }; // pixels
const DASHES = [["none", "solid"], ["7 3", "dashed"], ["2 3", "dotted"]]; // in SVG, in CSS: one more each six series
const MOST_DOTS = 40; // of a series, whose points have marks of their own

// Colour and stroke of a series.
function look(series, number) {
  const [dash, border] = DASHES[series.colour ? 0 : Math.floor(number / COLOURS.length) % DASHES.length];
  return { colour: series.colour ?? COLOURS[number % COLOURS.length], dash, border };
}

// About five round numbers from low to high.
function roundNumbers(low, high) {
  const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((s) => s * power >= raw) * power;
  const first = Math.ceil(low / step - 1e-9), count = Math.floor(high / step + 1e-9) - first + 1;
  return Array.from({ length: count }, (_, i) => +((first + i) * step).toPrecision(12));
}

// Colours from dark to light for an ordered set, such as gold positions.
function ramp(count) {
  return Array.from({ length: count }, (_, i) => {
    const share = i / Math.max(1, count - 1);
    return `hsl(${270 - 210 * share}, 60%, ${42 + 10 * share}%)`;
  });
}

// Lines over a common x. A series has a name, a colour and points [x, y, low, high, note], of which y may be null and
// what follows may be left out. y may be logarithmic, from 1 on, and counted downwards ("upside": 1 on top). Points
// that belong to no line stand alone ("dots").
function lineChart({ title, x, y, series, log = false, upside = false, from = null, to = null, ticks = null,
  dots = false }) {
  const { width, height, left, right, above, below } = CHART;
  const figure = element("figure", {}, element("figcaption", {}, title));
  const points = series.flatMap((s) => s.points).filter((p) => p[1] !== null);
  if (!points.length) {
    figure.append(element("p", { class: "faint" }, "no value exists"));
    return figure;
  }
  const xs = points.map((p) => p[0]), [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  const ys = points.flatMap((p) => p.slice(1, 4)).filter((value) => typeof value === "number");
  const scale = (value) => log ? Math.log10(Math.max(1, value)) : value;
  const low = scale(from ?? Math.min(...ys)), least = from === 0 && !log ? 1 : 1e-9;
  const high = Math.max(scale(to ?? Math.max(...ys)), low + least);
  const share = (value) => (scale(value) - low) / (high - low);
  const atX = (value) => left + (x1 === x0 ? 0.5 : (value - x0) / (x1 - x0)) * (width - left - right);
  const atY = (value) => above + (upside ? share(value) : 1 - share(value)) * (height - above - below);

  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" }, drawn("title", {}, title));
  const powers = Array.from({ length: Math.floor(high) + 1 }, (_, i) => 10 ** i).filter((value) => scale(value) >= low);
  for (const value of log ? powers : roundNumbers(low, high)) {
    const label = log ? value.toLocaleString("en") : String(+value.toPrecision(3));
    svg.append(drawn("line", { class: "grid", x1: left, x2: width - right, y1: atY(value), y2: atY(value) }),
      drawn("text", { x: left - 5, y: atY(value) + 3, "text-anchor": "end" }, label));
  }
  const places = ticks ?? [...new Set(xs)].sort((a, b) => a - b), step = Math.ceil(places.length / 11);
  for (const value of places.filter((_, i) => i % step === 0)) {
    svg.append(drawn("text", { x: atX(value), y: height - below + 14, "text-anchor": "middle" }, String(value)));
  }
  const middle = -(above + height - below) / 2;
  svg.append(drawn("text", { x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle" }, x),
    drawn("text", { x: middle, y: 11, transform: "rotate(-90)", "text-anchor": "middle" }, y));

  // So that intervals do not overlap.
  const beside = !dots && series.length > 1 && points.some((p) => typeof p[2] === "number");
  series.forEach((one, number) => {
    const { colour, dash } = look(one, number), own = one.points.filter((p) => p[1] !== null);
    const shift = beside ? (number - (series.length - 1) / 2) * 3 : 0, at = (value) => (atX(value) + shift).toFixed(1);
    for (const [px, , a, b] of own.filter((p) => typeof p[2] === "number")) {
      svg.append(drawn("line", { class: "interval", x1: at(px), x2: at(px), y1: atY(a), y2: atY(b), stroke: colour,
        "stroke-width": 1.2 }));
    }
    const path = own.map(([px, py], i) => `${i ? "L" : "M"}${at(px)} ${atY(py).toFixed(1)}`).join("");
    if (!dots) {
      svg.append(drawn("path", { d: path, fill: "none", stroke: colour, "stroke-width": 1.8,
        "stroke-dasharray": dash }));
    }
    for (const [px, py, a, b, note] of dots || own.length < MOST_DOTS ? own : []) {
      const interval = typeof a === "number" ? ` [${+a.toPrecision(3)}, ${+b.toPrecision(3)}]` : "";
      const words = `${one.name}: ${x} ${px}, ${+py.toPrecision(4)}${interval}${note ? `, ${note}` : ""}`;
      svg.append(drawn("circle", { cx: at(px), cy: atY(py), r: 2.6, fill: colour }, drawn("title", {}, words)));
    }
  });
  const names = series.map((one, number) => {
    const { colour, border } = look(one, number);
    return element("span", {}, element("i", { style: `border-top: 3px ${border} ${colour}` }), one.name);
  });
  figure.append(svg, element("div", { class: "names" }, ...names));
  return figure;
}
