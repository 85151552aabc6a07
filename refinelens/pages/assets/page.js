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

// The text of a token on one line.
function visible(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\r", "␍").replaceAll("\t", "⇥") || "∅";
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
  return element("button", { id: "theme", type: "button", onclick: turn, title: "light or dark (t)" }, "◐");
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
