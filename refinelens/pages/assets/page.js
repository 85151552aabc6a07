"use strict";
// What every page needs: its numbers unpacked, elements made of text alone, formats of numbers, themes.

const TYPES = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array };
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]; // Okabe and Ito 2008
const SVG = "http://www.w3.org/2000/svg";

// The head, and typed arrays by name, each with its shape.
async function unpack() {
  const head = JSON.parse(document.getElementById("head").textContent);
  const bytes = Uint8Array.from(atob(document.getElementById("data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const block = await new Response(stream).arrayBuffer();
  const arrays = {};
  for (const [name, [type, offset, shape]] of Object.entries(head.arrays)) {
    const size = shape.reduce((a, b) => a * b, 1);
    arrays[name] = new TYPES[type](block, offset, size);
    arrays[name].shape = shape;
  }
  return [head, arrays];
}

// An element; children that are strings become text, whatever they hold.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function drawn(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function choice(label, values, chosen, change) {
  const options = values.map(([value, text]) => element("option", { value, selected: value === chosen ? "" : null }, text));
  return element("label", {}, label, element("select", { onchange: (event) => change(event.target.value) }, ...options));
}

// The text of a token on one line; of spaces alone as signs, or nothing would be seen.
function visible(text) {
  if (text && !text.replaceAll(" ", "")) return text.replaceAll(" ", "␣");
  return text.replaceAll("\n", "⏎").replaceAll("\r", "␍").replaceAll("\t", "⇥").replace(/\p{C}/gu, "·") || "∅";
}

function percent(p) {
  return p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : p >= 0.0001 ? `${(100 * p).toPrecision(2)} %` : p.toExponential(1);
}

function themeButton() {
  const root = document.documentElement;
  const turn = () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  };
  return element("button", { id: "theme", type: "button", onclick: turn, title: "light or dark" }, "◐");
}

function facts(values) {
  const rows = Object.entries(values).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
  return element("dl", { class: "facts" }, ...rows);
}

async function start(page) {
  const root = document.getElementById("app");
  try {
    await page(root, ...(await unpack()));
    document.body.dataset.ready = "1";
  } catch (error) {
    root.append(element("p", {}, `This page could not be drawn: ${error}. It needs a browser of 2023 or newer.`));
    throw error;
  }
}

// About five round numbers from low to high.
function roundNumbers(low, high) {
  const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].find((s) => s * power >= raw) * power;
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => +((first + i) * step).toPrecision(12));
}

// Lines over a common x. A series has name, points [[x, y, low, high]], colour and dash; y may be logarithmic, from 1 on.
function lineChart({ title, x, y, series, log = false, upside = false, from = null, to = null, ticks = null }) {
  const width = 430, height = 250, left = 52, right = 10, above = 12, below = 36;
  const points = series.flatMap((s) => s.points).filter((p) => p[1] !== null);
  const xs = points.map((p) => p[0]), ys = points.flatMap((p) => [p[1], p[2], p[3]]).filter((v) => v !== null && v !== undefined);
  const figure = element("figure", {}, element("figcaption", {}, title));
  if (!points.length) {
    figure.append(element("p", { class: "faint" }, "no value exists"));
    return figure;
  }
  const scale = (v) => log ? Math.log10(Math.max(1, v)) : v;
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  const low = scale(from ?? Math.min(...ys)), least = from === 0 && !log ? 1 : 1e-9;
  const high = Math.max(scale(to ?? Math.max(...ys)), low + least);
  const atX = (v) => left + (x1 === x0 ? 0.5 : (v - x0) / (x1 - x0)) * (width - left - right);
  const share = (v) => (scale(v) - low) / (high - low);
  const atY = (v) => above + (upside ? share(v) : 1 - share(v)) * (height - above - below);
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  svg.append(drawn("title", {}, title));
  const values = log ? Array.from({ length: Math.floor(high) + 1 }, (_, i) => 10 ** i).filter((v) => scale(v) >= low)
    : roundNumbers(low, high);
  for (const value of values) {
    svg.append(drawn("line", { class: "grid", x1: left, x2: width - right, y1: atY(value), y2: atY(value) }),
      drawn("text", { x: left - 5, y: atY(value) + 3, "text-anchor": "end" },
        log ? value.toLocaleString("en") : String(+value.toPrecision(3))));
  }
  const all = ticks ?? [...new Set(xs)].sort((a, b) => a - b), step = Math.ceil(all.length / 11);
  for (const value of all.filter((_, i) => i % step === 0)) {
    svg.append(drawn("text", { x: atX(value), y: height - below + 14, "text-anchor": "middle" }, String(value)));
  }
  svg.append(drawn("text", { x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle" }, x));
  svg.append(drawn("text", { x: -(above + height - below) / 2, y: 11, transform: "rotate(-90)", "text-anchor": "middle" }, y));
  series.forEach((s, number) => {
    const colour = s.colour ?? COLOURS[number % COLOURS.length], own = s.points.filter((p) => p[1] !== null);
    const apart = series.length > 1 && series.some((t) => t.points.some((p) => typeof p[2] === "number"));
    const shift = apart ? (number - (series.length - 1) / 2) * 3 : 0;
    for (const [px, , a, b] of own) {
      if (a === null || a === undefined) continue;
      svg.append(drawn("line", { x1: atX(px) + shift, x2: atX(px) + shift, y1: atY(a), y2: atY(b), stroke: colour,
        "stroke-width": 1.2, class: "interval" }));
    }
    const path = own.map(([px, py], i) => `${i ? "L" : "M"}${(atX(px) + shift).toFixed(1)} ${atY(py).toFixed(1)}`).join("");
    svg.append(drawn("path", { d: path, fill: "none", stroke: colour, "stroke-width": 1.8, "stroke-dasharray": s.dash ?? "none" }));
    if (own.length < 40) for (const [px, py, a, b, note] of own) {
      const dot = drawn("circle", { cx: atX(px) + shift, cy: atY(py), r: 2.6, fill: colour });
      dot.append(drawn("title", {}, `${s.name}: ${x} ${px}, ${+py.toPrecision(4)}` +
        (a === null || a === undefined ? "" : ` [${+a.toPrecision(3)}, ${+b.toPrecision(3)}]`) + (note ? `, ${note}` : "")));
      svg.append(dot);
    }
  });
  const names = element("div", { class: "names" }, ...series.map((s, number) => element("span", {},
    element("i", { style: `background:${s.colour ?? COLOURS[number % COLOURS.length]}` }), s.name)));
  figure.append(svg, names);
  return figure;
}

// Colours from dark to light for an ordered set, such as gold positions.
function ramp(count) {
  return Array.from({ length: count }, (_, i) => { const v = i / Math.max(1, count - 1); return `hsl(${270 - 210 * v}, 60%, ${42 + 10 * v}%)`; });
}
