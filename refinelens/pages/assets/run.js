// The page of a run: finding, layers, questions, tokens; of several runs also what differs between them.

function runPage(root, head, arrays) {
  const runs = head.runs.map((run, number) => readRun(run, arrays, `${number}.`)), first = runs[0];
  const tabs = [["finding", "Finding"], ["layers", "Layers"], ["questions", "Questions"], ["tokens", "Tokens"]];
  if (runs.length > 1) tabs.push(["compare", "Runs compared"]);
  if (head.claim) tabs.unshift(["claim", "Claim"]);
  const links = tabs.map(([id, name]) => element("a", { href: `#${id}` }, name));
  root.append(element("h1", {}, first.title), element("div", { class: "bar" }, themeButton()),
    element("nav", { class: "bar", "aria-label": "levels" }, ...links));
  if (head.claim) root.append(claimLevel(head.claim));
  const tokens = tokensLevel(first);
  root.append(findingLevel(first), layersLevel(first), questionsLevel(first, tokens.show), tokens.section);
  if (runs.length > 1) {
    const parts = runs.slice(1).flatMap((run) => compared(first, run));
    root.append(section("compare", "Runs compared", ...parts));
  }
  root.append(element("h2", {}, "What was run"), facts(first.facts));
}

// A run with its rows, of each the context, lens, answer token, ranks and best tokens by layer.
function readRun(run, arrays, prefix) {
  const own = Object.entries(arrays).filter(([name]) => name.startsWith(prefix));
  const rows = Object.fromEntries(own.map(([name, array]) => [name.slice(prefix.length), array]));
  const n = rows.rank ? rows.rank.shape[0] : 0, layers = run.n_layers + 1;
  const places = new Map(run.contexts.map((c, i) => [`${c.question}/${c.documents}/${c.gold}/${c.decoy}`, i]));
  const byContext = run.contexts.map(() => []);
  for (let row = 0; row < n; row++) byContext[rows.context[row]].push(row);
  return {
    ...run, rows, n, layers, places, byContext,
    documents: JSON.parse(new TextDecoder().decode(rows.documents)),
    contextOf: (row) => run.contexts[rows.context[row]],
    textOf: (context) => run.questions[context.question]?.question ?? "",
    rank: (row, layer) => rows.rank[row * layers + layer], // 0-based
    best: (row, layer) => run.texts[rows.argmax[row * layers + layer]],
    depth: (row) => rows.settle[row] < 0 ? null : rows.settle[row] - rows.first[row],
  };
}

function section(id, name, ...children) {
  return element("section", { id }, element("h2", {}, name), ...children);
}

function condition(documents) {
  return documents === 0 ? "closed-book" : documents === 1 ? "oracle" : `${documents} documents`;
}

// Level 1.
function findingLevel(run) {
  const right = [], depth = [];
  for (const rows of groupsOf(run.summary.filter((r) => r.documents > 1), (r) => `${r.lens}/${r.top}/${r.documents}`)) {
    const [row] = rows, rank = run.tops.length > 1 ? `, rank <= ${row.top}` : "";
    const points = (name, n) => rows.map((r) => [r.gold_position, ...r[name], `n = ${r[n]}`]);
    depth.push({ name: `${row.lens}, ${row.condition}${rank}`, points: points("mean_depth", "settled") });
    if (row.lens !== run.lenses[0] || row.top !== run.top) continue;
    right.push({ name: row.condition, points: points("accuracy", "n") });
  }
  const charts = element("div", { class: "charts" });
  if (right.length) {
    charts.append(
      lineChart({ title: "Accuracy of the first answer token, 95 % intervals over questions", x: "gold position",
        y: "share right", series: right, from: 0, to: 1 }),
      lineChart({ title: "Refinement depth, over settled examples", x: "gold position", y: "layers", series: depth,
        from: 0 }));
  }
  const names = ["lens", "rank <=", "context", "gold", "questions", "right", "settled", "depth", "first correct",
    "settle"];
  const rows = run.summary.map((r) => [r.lens, r.top, r.condition, r.gold_position < 0 ? "-" : r.gold_position, r.n,
    estimate(r.accuracy, 2), r.settled, estimate(r.mean_depth, 1), estimate(r.mean_first_correct, 1),
    estimate(r.mean_settle, 1)]);
  return section("finding", "Finding", ...run.finding.map((line) => element("p", {}, line)),
    ...run.cautions.map((line) => element("p", { class: "caution" }, line)), charts,
    grid(names, rows, (i, column) => ({ class: column > 2 ? "number" : null })),
    element("details", {}, element("summary", {}, "Definitions, tests and checks"),
      ...run.notes.map((line) => element("p", { class: "faint" }, line))));
}

function estimate([value, low, high], digits) {
  if (value === null) return "-";
  return value.toFixed(digits) + (low === null ? "" : ` [${low.toFixed(digits)}, ${high.toFixed(digits)}]`);
}

// Lists of what has the same key, in the order in which keys come up.
function groupsOf(values, key) {
  const found = new Map();
  for (const value of values) found.set(key(value), [...(found.get(key(value)) ?? []), value]);
  return [...found.values()];
}

// Level 2.
function layersLevel(run) {
  const charts = element("div", { class: "charts" });
  const sizes = [...new Set(run.profiles.map((p) => p.documents))];
  const state = { lens: run.lenses[0], documents: sizes.find((s) => s > 1) ?? sizes[0] };
  function draw() {
    const own = run.profiles.filter((p) => p.lens === state.lens && p.documents === state.documents);
    const colours = ramp(own.length);
    const series = (name) => own.map((p, i) => ({ name: p.gold < 0 ? "no document" : `gold ${p.gold} (n = ${p.n})`,
      colour: colours[i], points: p[name].map((value, layer) => [layer, value]) }));
    charts.replaceChildren(
      lineChart({ title: "Rank of the target, median", x: "layer", y: "rank (1 is best)", series: series("rank"),
        log: true, upside: true, from: 1 }),
      lineChart({ title: "KL(output || layer), mean", x: "layer", y: "nats", series: series("kl"), from: 0 }),
      lineChart({ title: "Entropy, mean", x: "layer", y: "nats", series: series("entropy"), from: 0 }),
      ...run.measures.map((name) => lineChart({ ...MEASURED[name], x: "layer", series: series(name) })),
      ...frequencyCharts(run, state.lens, state.documents));
  }
  draw();
  const bar = element("div", { class: "bar" },
    choice("lens", run.lenses.map((l) => [l, l]), state.lens, (v) => { state.lens = v; draw(); }),
    choice("context", sizes.map((s) => [String(s), condition(s)]), String(state.documents),
      (v) => { state.documents = +v; draw(); }));
  const measured = [...cuesParts(run), ...settlingParts(run), ...effectiveParts(run), ...probeParts(run)];
  return section("layers", "Layers", bar, charts, ...measured, ...analysisParts(run));
}

// Of an analysis of layers, from its own tables.
function analysisParts(run) {
  const table = run.analysis["by layer"];
  if (!table) {
    const how = `Which layers are essential: refinelens layers ${run.folder} finds out; this page, made again, then ` +
      "shows it.";
    return [element("p", { class: "faint" }, how)];
  }
  const [names, ...lines] = table, at = (line, name) => line[names.indexOf(name)];
  const number = (line, name) => at(line, name) === "" ? null : +at(line, name);
  const wanted = lines.filter((line) => at(line, "gold_position") === "" &&
    ["logprob_gain", "logprob_cost"].includes(at(line, "statistic")));
  const charts = groupsOf(wanted, (line) => at(line, "documents")).map((own) => {
    const series = groupsOf(own, (line) => at(line, "of")).map((same) => {
      const of = at(same[0], "of");
      const points = same.map((line) => [+at(line, "layer"), number(line, "value"), number(line, "value_low"),
        number(line, "value_high"), `n = ${at(line, "questions")}`]);
      return { name: of === "lens" ? "gain by the lens" : `cost of ${of}`, points };
    });
    const title = `Log-probability of the target by layer, ${condition(+at(own[0], "documents"))}`;
    return lineChart({ title, x: "layer", y: "nats", series });
  });
  const parts = [element("h3", {}, "Essential layers"), element("div", { class: "charts" }, ...charts),
    ...attributionParts(run)];
  for (const name of ["essential layers", "early exit"]) {
    const rows = run.analysis[name];
    if (!rows) continue;
    parts.push(element("h3", {}, name[0].toUpperCase() + name.slice(1)), tableOf(rows));
  }
  return parts;
}

// What attention and feed-forward part add to the target's logit, held against what silencing them costs.
function attributionParts(run) {
  const of = (name) => {
    const [names, ...lines] = run.analysis[name] ?? [[]];
    return lines.map((line) => Object.fromEntries(names.map((column, i) => [column, line[i]])))
      .filter((row) => row.gold_position === "" && (row.statistic ?? row.lens_statistic) === "attribution");
  };
  const value = (text) => text === "" ? null : +text;
  const triple = (row) => [value(row.value), value(row.value_low), value(row.value_high)];
  const charts = groupsOf(of("by layer"), (row) => row.documents).map((own) => {
    const series = groupsOf(own, (row) => row.of).map((same) => ({ name: `attribution of ${same[0].of}`,
      points: same.map((row) => [+row.layer, ...triple(row), `n = ${row.questions}`]) }));
    const title = `Direct logit attribution by layer, ${condition(+own[0].documents)}`;
    return lineChart({ title, x: "layer", y: "nats", series });
  });
  const lines = groupsOf(of("agreement"), (row) => `${row.documents}/${row.intervention}`).map((own) => {
    const words = own.map((row) => `${row.coefficient} ${estimate(triple(row), 2)}`).join(", ");
    return element("p", {}, `Agreement over layers of direct logit attribution and cost of ${own[0].intervention}, ` +
      `${condition(+own[0].documents)}: ${words}.`);
  });
  return charts.length ? [element("div", { class: "charts" }, ...charts), ...lines] : [];
}

// A table of a CSV file, first line first; bounds of an interval stand behind their estimate.
function tableOf([names, ...lines]) {
  const shown = names.filter((name) => !/_(low|high)$/.test(name));
  const short = (text) => text === "" || isNaN(text) ? text : String(+(+text).toPrecision(3));
  const cells = lines.map((line) => shown.map((name) => {
    const at = (suffix) => short(line[names.indexOf(name + suffix)] ?? "");
    if (at("") === "") return name === "gold_position" ? "all" : "-";
    return at("") + (at("_low") === "" ? "" : ` [${at("_low")}, ${at("_high")}]`);
  }));
  const isNumber = shown.map((_, j) => cells.every((line) => line[j] === "-" || /^[-\d]/.test(line[j])));
  return grid(shown.map((name) => name.replaceAll("_", " ")), cells,
    (i, j) => ({ class: isNumber[j] ? "number" : null }));
}

// Run b less run a, over the contexts that both have.
function compared(a, b) {
  const parts = [element("h3", {}, `${b.name} less ${a.name}`), ...b.compared.map((line) => element("p", {}, line))];
  if (!b.shared) return parts;
  const rowOf = (run, context) => run.byContext[context].find((row) => run.rows.token[row] === 0 &&
    run.rows.lens[row] === b.lenses[run === a ? 0 : 1]);
  const shared = []; // of each its context, its row in a, its row in b
  for (const [key, i] of a.places) {
    const j = b.places.get(key);
    if (j === undefined) continue;
    const [own, other] = [a.textOf(a.contexts[i]), b.textOf(b.contexts[j])], [x, y] = [rowOf(a, i), rowOf(b, j)];
    if ((!own || !other || own === other) && x !== undefined && y !== undefined) shared.push([a.contexts[i], x, y]);
  }
  const curve = (run, at) => Array.from({ length: run.layers }, (_, layer) =>
    [layer / run.n_layers, median(shared.map((own) => run.rank(own[at], layer) + 1))]);
  const charts = [lineChart({ title: `Rank of the target over ${shared.length} shared contexts on this page, median`,
    x: "share of the layers", y: "rank (1 is best)", log: true, upside: true, from: 1, ticks: [0, 0.25, 0.5, 0.75, 1],
    series: [{ name: a.name, points: curve(a, 1) }, { name: b.name, points: curve(b, 2) }] })];
  if (b.agreement.length) {
    charts.push(lineChart({ title: "Agreement of the order of contexts by rank, Kendall's tau-b", x: "layer",
      y: "tau-b", from: Math.min(0, ...b.agreement.filter((value) => value !== null)), to: 1,
      series: [{ name: `${a.name} and ${b.name}`, points: b.agreement.map((value, layer) => [layer, value]) }] }));
  }
  const differs = shared.map(([context, x, y]) => {
    const [p, q] = [a.depth(x), b.depth(y)], right = b.rows.correct[y] - a.rows.correct[x];
    const depth = p === null || q === null ? null : q - p;
    return { context, right, depth, weight: 100 * Math.abs(right) + Math.abs(depth ?? 0) };
  }).filter((own) => own.weight > 0).sort((p, q) => q.weight - p.weight).slice(0, 20);
  const rows = differs.map(({ context: c, right, depth }) => [c.question, a.textOf(c), condition(c.documents),
    c.gold < 0 ? "-" : c.gold, right > 0 ? "gained" : right < 0 ? "lost" : "same",
    depth === null ? "-" : (depth > 0 ? "+" : "") + depth]);
  return [...parts, element("div", { class: "charts" }, ...charts), element("h3", {}, "Contexts that differ most"),
    grid(["question", "", "context", "gold", "right", "depth"], rows)];
}

function median(values) {
  const sorted = [...values].sort((p, q) => p - q), half = sorted.length >> 1;
  return !sorted.length ? null : sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}
