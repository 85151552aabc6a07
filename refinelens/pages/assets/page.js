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
  const options = values.map(([value, text]) =>
    element("option", { value, selected: value === chosen ? "" : null }, text));
  const select = element("select", { onchange: (event) => change(event.target.value) }, ...options);
  return element("label", {}, label, select);
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
    const chosen = root.dataset.theme, system = matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = (chosen ? chosen === "dark" : system) ? "light" : "dark";
  };
  return element("button", { id: "theme", type: "button", onclick: turn, title: "light or dark" }, "◐");
}

function facts(values) {
  const rows = Object.entries(values).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
  return element("dl", { class: "facts" }, ...rows);
}

// A table of texts. Attributes of a cell come from its row and column, where some are wanted.
function grid(names, rows, attributes = () => ({}), caption = null) {
  const isNumber = (j) => rows.length && `${attributes(0, j).class}`.includes("number");
  const heads = names.map((name, j) => element("th", { class: isNumber(j) ? "number" : null }, name));
  const lines = rows.map((row, i) => element("tr", {}, ...row.map((value, j) =>
    element("td", attributes(i, j), String(value)))));
  return element("div", { class: "wide" }, element("table", { class: "grid" },
    caption === null ? null : element("caption", {}, caption),
    element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...lines)));
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
