// How far the layers of one model are from those of another.

async function driftPage(root, head) {
  const title = (what) => what[0].toUpperCase() + what.slice(1);
  const charts = Object.entries(head.measures).map(([name, what]) => lineChart({ title: title(what), x: "layer", y: "",
    series: [{ name: "mean over tokens, 95 % interval over sequences",
      points: head.layers[name].map((value, layer) => [layer, ...value]) }] }));
  const names = Object.keys(head.measures), depth = head.layers[names[0]].length;
  const rows = Array.from({ length: depth }, (_, layer) => [layer, ...names.map((name) => {
    const [value, low, high] = head.layers[name][layer];
    const interval = low === null ? "" : ` [${+low.toPrecision(3)}, ${+high.toPrecision(3)}]`;
    return value === null ? "-" : `${+value.toPrecision(3)}${interval}`;
  })]);
  root.append(element("h1", {}, head.title), element("div", { class: "bar" }, themeButton()),
    ...head.lines.map((line) => element("p", {}, line)), element("div", { class: "charts" }, ...charts),
    grid(["layer", ...names.map((name) => name.replaceAll("_", " "))], rows, () => ({ class: "number" })),
    facts(head.facts));
}
