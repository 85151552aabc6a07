// The heat map: layers upwards, tokens to the right. Only the columns in view are elements.

const COLUMN = 88, AXIS = 46, ROW = 22;
const PAPER = { columns: 11, bands: 16 }; // of a sheet of A4 on its side, and as many bands as are printed
const DEEP = 0.655; // of a colour: there black and white stand out alike, in both themes
const MEASURES = {
  probability: { name: "probability of the best token", ends: ["0", "1"] },
  rank: { name: "rank of the target", ends: ["last", "1"] },
  entropy: { name: "entropy", ends: ["uniform", "0 nats"] },
  kl: { name: "KL(output || layer)", ends: ["largest", "0 nats"] },
  agreement: { name: "agreement with the output", ends: ["not listed", "the same token"] },
};
const HELP = [["← → ↑ ↓", "move"], ["Home End PgUp PgDn", "far"], ["Enter", "pin"], ["Esc", "unpin all"],
  ["m", "measure"], ["l", "lens"], ["/", "search"], ["t", "theme"]];

function heatmapPage(root, head, arrays) {
  root.append(element("h1", {}, head.title));
  const map = heatMap(head, arrays);
  root.append(...map.elements);
  root.append(element("h2", {}, "What these numbers are"), facts(head.facts));
  map.show();
}

// A map of one text.
function heatMap(head, arrays) {
  const { texts, layers } = head;
  const tokens = arrays.tokens, targets = arrays.targets, n = tokens.length;
  const of = (name) => arrays[`${state.lens}.${name}`];
  const top = layers.length - 1, vocabulary = Math.max(2, head.vocab_size || 2);
  const measures = Object.keys(MEASURES).filter((m) => m !== "rank" || "0.rank" in arrays)
    .filter((m) => m !== "kl" || "0.kl" in arrays);
  const state = { lens: 0, measure: measures[0], every: 1, rows: [], column: n - 1, row: 0, pins: [], query: "" };
  const kind = new Array(n).fill("");
  for (const segment of head.segments) kind.fill(segment.kind, segment.start, segment.end);
  const text = (place) => visible(texts[place]);
  const drawnColumns = new Map();

  const live = element("div", { class: "detail", "aria-live": "polite" });
  const chart = element("div", { class: "chart" });
  const pinned = element("div", { class: "pins" });
  const side = element("aside", { class: "side" }, live, chart, pinned);
  const axis = element("div", { class: "axis", "aria-hidden": "true" });
  const inner = element("div", { class: "inner" }, axis);
  const map = element("div", {
    class: "map", role: "grid", tabindex: "0", "aria-label": "layers by tokens; arrow keys move, Enter pins",
    "aria-rowcount": layers.length, "aria-colcount": n,
    onscroll: () => requestAnimationFrame(() => drawColumns()), onkeydown: key, onfocus: () => show(),
    onmousemove: (event) => point(event, false), onclick: (event) => point(event, true),
  }, inner);
  const paper = element("div", { class: "paper" });
  const found = element("span", { class: "faint", id: "found", "aria-live": "polite" });
  const search = element("input", { id: "search", type: "search", placeholder: "token", oninput: look,
    onkeydown: (event) => { if (event.key === "Enter") nextHit(event.shiftKey ? -1 : 1); } });
  const legend = element("span", { class: "legend" });
  const steps = [1, 2, 4, 8].filter((step) => step === 1 || step < top);
  const lensChoice = choice("lens", head.lenses.map((name, i) => [String(i), name]), "0",
    (v) => { state.lens = +v; redraw(); });
  const measureChoice = choice("colour", measures.map((m) => [m, MEASURES[m].name]), state.measure,
    (v) => { state.measure = v; redraw(); });
  const jumps = head.segments.map((s, i) => [String(i), s.label]);
  const bar = element("div", { class: "bar" }, lensChoice, measureChoice,
    choice("layers", steps.map((s) => [String(s), s === 1 ? "all" : `every ${s}`]), "1",
      (v) => { state.every = +v; layout(); }),
    jumps.length ? choice("go to", [["", "…"], ...jumps], "",
      (v) => { if (v) go(head.segments[+v].start, state.row); }) : null,
    element("label", {}, "search", search), found, themeButton(), legend);
  const help = element("p", { class: "faint help" });
  for (const [keys, what] of HELP) help.append(element("kbd", {}, keys), ` ${what}  `);
  const targetIs = targets ? `target: ${head.target_is}`
    : "no target: first-correct and settle are of the output's own token";
  const isWritten = head.segments.some((s) => s.kind === "generated");
  const marks = element("p", { class: "faint" }, `${targetIs}. Small numbers: its rank, where another token is best. ` +
    "Outlined: the first layer whose best token is it; outlined boldly: the layer from which it stays so (where that " +
    "layer is shown). What a column shows is predicted to follow its token" +
    (isWritten ? ": a generated token was written in the column before its own." : "."));

  const logProbability = (layer, column) => of("max_logprob")[layer * n + column];
  let largestKl = 1;

  // How strongly a cell is coloured, 0 to 1: strong where the model is sure, or near its output.
  function strength(layer, column) {
    const i = layer * n + column;
    switch (state.measure) {
      case "probability": return Math.exp(of("max_logprob")[i]);
      case "rank": return 1 - Math.log(of("rank")[i] + 1) / Math.log(vocabulary);
      case "entropy": return 1 - of("entropy")[i] / Math.log(vocabulary);
      case "kl": return 1 - Math.log1p(of("kl")[i]) / Math.log1p(largestKl);
      default: {
        const same = of("argmax")[top * n + column];
        return of("argmax")[i] === same ? 1 : place(layer, column, same) >= 0 ? 0.45 : 0;
      }
    }
  }

  // Of a token in a cell's list, -1 if it is not there.
  function place(layer, column, token) {
    const list = of("top");
    if (!list) return -1;
    const k = list.shape[2], from = (layer * n + column) * k;
    return list.subarray(from, from + k).indexOf(token);
  }

  function layout() {
    state.rows = [];
    for (let layer = top; layer >= 0; layer -= state.every) state.rows.push(layer);
    if (state.rows.at(-1) !== 0) state.rows.push(0);
    state.row = Math.min(state.row, state.rows.length - 1);
    axis.replaceChildren(element("div", { class: "top" }, targets ? "target" : ""),
      ...state.rows.map((layer, row) =>
        element("div", { class: row ? "" : "output" }, row ? String(layers[layer]) : "output")),
      element("div", { class: "token" }, "token"));
    inner.style.width = `${AXIS + n * COLUMN}px`;
    redraw();
  }

  function redraw() {
    const kl = of("kl");
    if (kl) largestKl = kl.reduce((a, b) => Math.max(a, b), 1e-6);
    lensChoice.lastChild.value = String(state.lens);
    measureChoice.lastChild.value = state.measure;
    const [low, high] = MEASURES[state.measure].ends;
    legend.replaceChildren(low, element("i"), high);
    for (const column of drawnColumns.values()) column.remove();
    drawnColumns.clear();
    drawColumns();
    show();
  }

  function drawColumns() {
    const first = Math.max(0, Math.floor((map.scrollLeft - AXIS) / COLUMN) - 3);
    const last = Math.min(n - 1, Math.ceil((map.scrollLeft + (map.clientWidth || 1000)) / COLUMN) + 3);
    for (const [column, made] of drawnColumns) {
      if (column < first || column > last) { made.remove(); drawnColumns.delete(column); }
    }
    for (let column = first; column <= last; column++) {
      if (!drawnColumns.has(column)) {
        const made = drawColumn(column);
        drawnColumns.set(column, made);
        inner.append(made);
      }
    }
    mark();
  }

  // On paper the map goes on in bands below each other: all of it, or of a long text what begins with the view.
  function drawBands() {
    const { columns, bands } = PAPER, many = columns * bands, inView = Math.floor(map.scrollLeft / COLUMN);
    const first = n <= many ? 0 : Math.min(inView, n - many), last = Math.min(n, first + many), made = [];
    for (let start = first; start < last; start += columns) {
      const own = Array.from({ length: Math.min(columns, last - start) }, (_, i) => drawColumn(start + i));
      made.push(element("div", { class: "band" }, axis.cloneNode(true), ...own));
    }
    const cut = last - first < n ? `Tokens ${first} to ${last - 1} of ${n}, counted from 0.` : "";
    paper.replaceChildren(element("p", {}, cut), ...made);
    for (const cell of paper.querySelectorAll("[id]")) cell.removeAttribute("id"); // theirs are of the map
  }

  // The target's rank, where it is not the best token: three signs at most.
  function rankNote(layer, column) {
    const rank = of("rank") ? of("rank")[layer * n + column] + 1 : 1;
    if (rank === 1) return null;
    if (rank < 1000) return element("small", {}, String(rank));
    return element("small", {}, rank < 99500 ? `${Math.round(rank / 1000)}k` : `${(rank / 1e6).toFixed(1)}M`);
  }

  function drawColumn(column) {
    const firstCorrect = of("first")[column], settle = of("settle")[column];
    const cells = state.rows.map((layer, row) => {
      const v = Math.min(1, Math.max(0, strength(layer, column))), token = of("argmax")[layer * n + column];
      const classes = ["cell", row ? "" : "output", v > DEEP ? "deep" : "", isHit(token) ? "hit" : "",
        layers[layer] === firstCorrect ? "first" : "", layers[layer] === settle ? "settle" : ""];
      return element("div", { class: classes.filter(Boolean).join(" "), id: `c${column}-${row}`, role: "gridcell",
        "data-column": column, "data-row": row, style: `--v:${v.toFixed(3)}` }, text(token), rankNote(layer, column));
    });
    const token = tokens[column], target = targets ? text(targets[column]) : "";
    const classes = `token ${kind[column]} ${isHit(token) ? "hit" : ""}`;
    return element("div", { class: "column", style: `left:${AXIS + column * COLUMN}px` },
      element("div", { class: "top", title: target }, target), ...cells,
      element("div", { class: classes, "data-column": column, title: text(token) }, text(token)));
  }

  // Focus and pins, without drawing anything again.
  function mark() {
    for (const old of map.querySelectorAll(".here")) old.classList.remove("here");
    const here = document.getElementById(`c${state.column}-${state.row}`);
    if (here) { here.classList.add("here"); map.setAttribute("aria-activedescendant", here.id); }
    for (const [column, made] of drawnColumns) {
      made.lastChild.classList.toggle("pinned", state.pins.some((pin) => pin.column === column));
    }
  }

  function show() {
    mark();
    detail();
    drawChart();
  }

  function detail() {
    const { column } = state, layer = state.rows[state.row], i = layer * n + column;
    const where = layer === top ? `output (layer ${layers[layer]})` : `layer ${layers[layer]}`;
    const rows = [["token", JSON.stringify(texts[tokens[column]]), `place ${head.positions[column]}`]];
    rows.push(["best next", JSON.stringify(texts[of("argmax")[i]]), percent(Math.exp(logProbability(layer, column)))]);
    if (of("rank")) {
      rows.push(["target", JSON.stringify(texts[targets[column]]), `rank ${(of("rank")[i] + 1).toLocaleString("en")}`]);
      rows.push(["", "", percent(Math.exp(of("logprob")[i]))]);
    }
    rows.push(["entropy", "", `${of("entropy")[i].toFixed(3)} nats`]);
    if (of("kl")) rows.push(["KL to output", "", `${of("kl")[i].toFixed(3)} nats`]);
    const [attn, mlp] = ["attn", "mlp"].map((name) => of(name) ? of(name)[i] : NaN); // logits of the target
    if (!isNaN(attn)) rows.push([isNaN(mlp) ? "embedding adds" : "attention adds", "", attn.toFixed(3)]);
    if (!isNaN(mlp)) rows.push(["feed-forward adds", "", mlp.toFixed(3)]);
    const [a, b] = [of("first")[column], of("settle")[column]];
    rows.push(["first correct", "", a < 0 ? "never" : `layer ${a}`], ["settles", "", b < 0 ? "never" : `layer ${b}`]);
    const lines = rows.map(([name, value, number]) => element("tr", {}, element("td", {}, name),
      element("td", {}, value), element("td", { class: "number" }, number)));
    live.replaceChildren(element("h3", {}, where), element("table", { class: "numbers" }, ...lines));
    const list = of("top");
    if (!list) return;
    const k = list.shape[2], best = [];
    for (let j = 0; j < k; j++) {
      const p = Math.exp(-of("top_logprob")[i * k + j] / 1000);
      best.push(element("tr", {}, element("td", {}, JSON.stringify(texts[list[i * k + j]])),
        element("td", { class: "probability" }, element("i", { style: `width:${(100 * p).toFixed(1)}%` })),
        element("td", { class: "number" }, percent(p))));
    }
    live.append(element("h3", {}, `${k} likeliest`), element("table", { class: "likeliest" }, ...best));
  }

  // Ranks over layers of what is pinned, or else of the column in focus.
  function drawChart() {
    const here = { column: state.column, token: targets ? targets[state.column] : null };
    const pins = state.pins.length ? state.pins : [here];
    const ranked = Boolean(of("rank")), width = 318, height = 200, left = 44, right = 8, above = 10, below = 26;
    const xOf = (layer) => left + (layers[layer] / Math.max(1, layers[top])) * (width - left - right);
    const most = ranked ? Math.log10(vocabulary) : 1;
    const yOf = (value) => above + (ranked ? Math.log10(value + 1) / most : 1 - value) * (height - above - below);
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%", role: "img" });
    svg.append(drawn("title", {}, ranked ? "rank of the target by layer" : "probability of the best token by layer"));
    const ticks = ranked ? Array.from({ length: Math.floor(most) + 1 }, (_, i) => 10 ** i - 1) : [0, 0.5, 1];
    for (const tick of ticks) {
      const y = yOf(tick), label = ranked ? (tick + 1).toLocaleString("en") : String(tick);
      svg.append(drawn("line", { class: "grid", x1: left, x2: width - right, y1: y, y2: y }),
        drawn("text", { x: left - 4, y: y + 3, "text-anchor": "end" }, label));
    }
    for (const layer of [0, Math.floor(top / 2), top]) {
      svg.append(drawn("text", { x: xOf(layer), y: height - 12, "text-anchor": "middle" }, String(layers[layer])));
    }
    svg.append(drawn("text", { x: width - right, y: height - 1, "text-anchor": "end" }, "layer"));
    pins.forEach((pin, number) => {
      const { column, token } = pin, colour = COLOURS[number % COLOURS.length];
      const ink = { stroke: colour, "stroke-width": 2 };
      const value = (layer) => ranked ? of("rank")[layer * n + column] : Math.exp(logProbability(layer, column));
      line(svg, (layer) => [xOf(layer), yOf(value(layer))], () => true, { ...ink, class: "exact" });
      if (ranked && token !== null && token !== targets[column]) { // another token: known where it is listed
        const own = (layer) => place(layer, column, token);
        line(svg, (layer) => [xOf(layer), yOf(own(layer))], (layer) => own(layer) >= 0,
          { ...ink, "stroke-dasharray": "3 3" });
      }
      for (const name of ["first", "settle"]) {
        const layer = layers.indexOf(of(name)[column]);
        if (layer < 0) continue;
        const shape = name === "first" ? { r: 3.5, fill: "none", stroke: colour } : { r: 4, fill: colour };
        svg.append(drawn("circle", { cx: xOf(layer), cy: yOf(value(layer)), ...shape, class: name }));
      }
    });
    const title = ranked ? "Rank of the target over layers" : "Probability over layers";
    chart.replaceChildren(element("h3", {}, title), svg, ...addedChart(xOf));
    pinned.replaceChildren(...state.pins.map(({ column, token }, number) => {
      const shown = token === null ? "" : ` → ${text(token)}`;
      const style = `border-left-color:${COLOURS[number % COLOURS.length]}`;
      const unpin = () => { state.pins.splice(number, 1); show(); };
      return element("button", { type: "button", title: "unpin", style, onclick: unpin },
        `${head.positions[column]} ${text(tokens[column])}${shown}`);
    }));
  }

  // What attention and feed-forward part of every block add to the target's logit in the column in focus.
  function addedChart(xOf) {
    if (!of("attn")) return [];
    const { column } = state, height = 130, above = 8, below = 18, parts = ["attn", "mlp"];
    const value = (name, layer) => of(name)[layer * n + column];
    const all = parts.flatMap((name) => layers.map((_, layer) => value(name, layer))).filter((v) => !isNaN(v));
    const [low, high] = [Math.min(0, ...all), Math.max(0, ...all)];
    const yOf = (v) => above + (1 - (v - low) / Math.max(1e-9, high - low)) * (height - above - below);
    const svg = drawn("svg", { viewBox: `0 0 318 ${height}`, width: "100%", role: "img", class: "added" });
    for (const tick of new Set([low, 0, high])) {
      svg.append(drawn("line", { class: "grid", x1: 44, x2: 310, y1: yOf(tick), y2: yOf(tick) }),
        drawn("text", { x: 40, y: yOf(tick) + 3, "text-anchor": "end" }, String(+tick.toPrecision(2))));
    }
    parts.forEach((name, number) => line(svg, (layer) => [xOf(layer), yOf(value(name, layer))],
      (layer) => !isNaN(value(name, layer)), { stroke: COLOURS[number], "stroke-width": 2, class: name }));
    const names = ["attention", "feed-forward part"].map((name, number) => element("span", {},
      element("i", { style: `border-top: 3px solid ${COLOURS[number]}` }), name));
    const title = element("h3", {}, "Added to the target's logit, by layer");
    return [title, svg, element("div", { class: "names" }, ...names)];
  }

  function line(svg, point, there, attributes) {
    let path = "";
    for (let layer = 0, on = false; layer <= top; layer++) {
      if (!there(layer)) { on = false; continue; }
      const [x, y] = point(layer);
      path += `${on ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}${on ? "" : "h0.01"}`;
      on = true;
    }
    svg.append(drawn("path", { d: path, fill: "none", "stroke-linecap": "round", ...attributes }));
  }

  function point(event, click) {
    const cell = event.target.closest("[data-column]");
    if (!cell) return;
    const column = +cell.dataset.column, row = cell.dataset.row === undefined ? state.row : +cell.dataset.row;
    const moved = column !== state.column || row !== state.row;
    state.column = column;
    state.row = row;
    if (click) pin(cell.dataset.row !== undefined);
    else if (moved) show();
  }

  function pin(ofCell) {
    const { column } = state;
    const token = ofCell ? of("argmax")[state.rows[state.row] * n + column] : targets ? targets[column] : null;
    const at = state.pins.findIndex((pin) => pin.column === column && pin.token === token);
    if (at >= 0) state.pins.splice(at, 1);
    else state.pins.push({ column, token });
    show();
  }

  function go(column, row) {
    state.column = Math.min(n - 1, Math.max(0, column));
    state.row = Math.min(state.rows.length - 1, Math.max(0, row));
    const x = AXIS + state.column * COLUMN;
    if (x - AXIS < map.scrollLeft) map.scrollLeft = x - AXIS;
    else if (x + COLUMN > map.scrollLeft + map.clientWidth) map.scrollLeft = x + COLUMN - map.clientWidth;
    const y = ROW * (state.row + 1);
    if (y - ROW < map.scrollTop) map.scrollTop = y - ROW;
    else if (y + 2 * ROW > map.scrollTop + map.clientHeight) map.scrollTop = y + 2 * ROW - map.clientHeight;
    drawColumns();
    show();
  }

  function key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { column, row } = state;
    const moves = {
      ArrowLeft: [column - 1, row], ArrowRight: [column + 1, row],
      ArrowUp: [column, row - 1], ArrowDown: [column, row + 1],
      Home: [0, row], End: [n - 1, row], PageUp: [column - 10, row], PageDown: [column + 10, row],
    };
    const next = (values, value) => values[(values.indexOf(value) + 1) % values.length];
    if (moves[event.key]) go(...moves[event.key]);
    else if (event.key === "Enter" || event.key === " ") pin(true);
    else if (event.key === "Escape") { state.pins = []; show(); }
    else if (event.key === "m") { state.measure = next(measures, state.measure); redraw(); }
    else if (event.key === "l") { state.lens = (state.lens + 1) % head.lenses.length; redraw(); }
    else if (event.key === "/") search.focus();
    else if (event.key === "t") document.getElementById("theme").click();
    else return;
    event.preventDefault();
  }

  function isHit(token) {
    return state.query !== "" && texts[token].toLowerCase().includes(state.query);
  }

  // Columns whose token, or whose best token at a shown layer, holds what is sought.
  function hits() {
    const own = texts.map((_, token) => isHit(token));
    const isThere = (column) => state.rows.some((layer) => own[of("argmax")[layer * n + column]]);
    return [...tokens.keys()].filter((column) => own[tokens[column]] || isThere(column));
  }

  function look() {
    state.query = search.value.toLowerCase();
    const there = state.query ? hits() : [];
    found.textContent = state.query ? `${there.length} column${there.length === 1 ? "" : "s"}` : "";
    redraw();
  }

  function nextHit(step) {
    const there = hits();
    if (!there.length) return;
    const later = step > 0 ? there.find((c) => c > state.column) : there.findLast((c) => c < state.column);
    go(later ?? (step > 0 ? there[0] : there.at(-1)), state.row);
  }

  addEventListener("resize", () => drawColumns());
  addEventListener("beforeprint", drawBands);
  addEventListener("afterprint", () => paper.replaceChildren());
  return {
    elements: [marks, bar, element("div", { class: "split" }, map, paper, side), help],
    show() {
      layout();
      go(n - 1, 0);
    },
  };
}
