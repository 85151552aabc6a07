// The page of a run: finding, layers, questions, tokens; of several runs also what differs between them.

const ROWS = 28, STRIP = 26; // pixels of a row; rows drawn at a time

function runPage(root, head, arrays) {
  const runs = head.runs.map((run, number) => readRun(run, arrays, `${number}.`));
  const first = runs[0];
  const tabs = [["finding", "Finding"], ["layers", "Layers"], ["questions", "Questions"], ["tokens", "Tokens"]];
  if (runs.length > 1) tabs.push(["compare", "Runs compared"]);
  root.append(element("h1", {}, first.title), element("div", { class: "bar" }, themeButton()),
    element("nav", { class: "bar", "aria-label": "levels" }, ...tabs.map(([id, name]) => element("a", { href: `#${id}` }, name))));
  root.append(findingLevel(first), layersLevel(first));
  const tokens = tokensLevel(first);
  root.append(questionsLevel(first, tokens.show), tokens.section);
  if (runs.length > 1) root.append(compareLevel(runs));
  root.append(element("h2", {}, "What was run"), facts(first.facts));
}

// A run with its rows: of each the context, lens, answer token, ranks and best tokens by layer.
function readRun(run, arrays, prefix) {
  const rows = {};
  for (const [name, array] of Object.entries(arrays)) if (name.startsWith(prefix)) rows[name.slice(prefix.length)] = array;
  const text = new TextDecoder().decode(rows.documents);
  const n = rows.rank ? rows.rank.shape[0] : 0, layers = run.n_layers + 1;
  const places = new Map(run.contexts.map((c, i) => [`${c.question}/${c.documents}/${c.gold}`, i]));
  const byContext = run.contexts.map(() => []);
  for (let row = 0; row < n; row++) byContext[rows.context[row]].push(row);
  return { ...run, rows, n, layers, documents: JSON.parse(text), places, byContext,
    rank: (row, layer) => rows.rank[row * layers + layer], best: (row, layer) => run.texts[rows.argmax[row * layers + layer]] };
}

function section(id, name, ...children) {
  return element("section", { id }, element("h2", {}, name), ...children);
}

function condition(documents) {
  return documents === 0 ? "closed-book" : documents === 1 ? "oracle" : `${documents} documents`;
}

// Level 1.
function findingLevel(run) {
  const charts = element("div", { class: "charts" });
  const depthSeries = [], rightSeries = [], seen = new Set();
  for (const row of run.summary.filter((r) => r.documents > 1)) {
    const key = `${row.lens}/${row.top}/${row.documents}`;
    if (seen.has(key)) continue;
    seen.add(key);
    const own = run.summary.filter((r) => `${r.lens}/${r.top}/${r.documents}` === key);
    const points = (name) => own.map((r) => [r.gold_position, ...r[name], `n = ${name.startsWith("acc") ? r.n : r.settled}`]);
    const rank = run.tops.length > 1 ? `, rank <= ${row.top}` : "";
    depthSeries.push({ name: `${row.lens}, ${row.condition}${rank}`, points: points("mean_depth") });
    if (row.lens === run.lenses[0] && row.top === run.top) rightSeries.push({ name: row.condition, points: points("accuracy") });
  }
  charts.append(lineChart({ title: "Accuracy of the first answer token, 95 % intervals over questions", x: "gold position",
    y: "share right", series: rightSeries, from: 0, to: 1 }));
  charts.append(lineChart({ title: "Refinement depth, over settled examples", x: "gold position", y: "layers", series: depthSeries, from: 0 }));
  const cell = (triple, digits) => triple[0] === null ? "-"
    : triple[0].toFixed(digits) + (triple[1] === null ? "" : ` [${triple[1].toFixed(digits)}, ${triple[2].toFixed(digits)}]`);
  const names = ["lens", "rank <=", "context", "gold", "questions", "right", "settled", "depth", "first correct", "settle"];
  const table = element("table", { class: "grid" }, element("thead", {}, element("tr", {}, ...names.map((n) => element("th", {}, n)))),
    element("tbody", {}, ...run.summary.map((r) => element("tr", {}, ...[r.lens, r.top, r.condition,
      r.gold_position < 0 ? "-" : r.gold_position, r.n, cell(r.accuracy, 2), r.settled, cell(r.mean_depth, 1),
      cell(r.mean_first_correct, 1), cell(r.mean_settle, 1)].map((value, i) => element("td", { class: i > 2 ? "number" : "" }, String(value)))))));
  return section("finding", "Finding", ...run.finding.map((line) => element("p", {}, line)),
    ...run.cautions.map((line) => element("p", { class: "caution" }, line)), charts,
    element("div", { class: "wide" }, table),
    element("details", {}, element("summary", {}, "Definitions, tests and checks"), ...run.notes.map((line) => element("p", { class: "faint" }, line))));
}

// Level 2.
function layersLevel(run) {
  const charts = element("div", { class: "charts" });
  const sizes = [...new Set(run.profiles.map((p) => p.documents))];
  const state = { lens: run.lenses[0], documents: sizes.find((s) => s > 1) ?? sizes[0] };
  const draw = () => {
    const own = run.profiles.filter((p) => p.lens === state.lens && p.documents === state.documents);
    const colours = ramp(own.length);
    const series = (name) => own.map((p, i) => ({ name: p.gold < 0 ? "no document" : `gold ${p.gold} (n = ${p.n})`, colour: colours[i],
      points: p[name].map((value, layer) => [layer, value]) }));
    charts.replaceChildren(
      lineChart({ title: "Rank of the target, median", x: "layer", y: "rank (1 is best)", series: series("rank"), log: true, upside: true, from: 1 }),
      lineChart({ title: "KL(output || layer), mean", x: "layer", y: "nats", series: series("kl"), from: 0 }),
      lineChart({ title: "Entropy, mean", x: "layer", y: "nats", series: series("entropy"), from: 0 }));
  };
  draw();
  const bar = element("div", { class: "bar" },
    choice("lens", run.lenses.map((l) => [l, l]), state.lens, (v) => { state.lens = v; draw(); }),
    choice("context", sizes.map((s) => [String(s), condition(s)]), String(state.documents), (v) => { state.documents = +v; draw(); }));
  return section("layers", "Layers", bar, charts, ...analysisParts(run));
}

// Of an analysis of layers, from its own tables.
function analysisParts(run) {
  const table = run.analysis["by layer"];
  if (!table) return [element("p", { class: "faint" }, `Which layers are essential: refinelens layers ${run.name} finds out; this page then shows it.`)];
  const [names, ...lines] = table, at = (line, name) => line[names.indexOf(name)];
  const wanted = lines.filter((l) => at(l, "gold_position") === "" && ["logprob_gain", "logprob_cost"].includes(at(l, "statistic")));
  const parts = [element("h3", {}, "Essential layers")], charts = element("div", { class: "charts" });
  for (const size of [...new Set(wanted.map((l) => at(l, "documents")))]) {
    const own = wanted.filter((l) => at(l, "documents") === size);
    const series = [...new Set(own.map((l) => at(l, "of")))].map((of) => ({ name: of === "lens" ? "gain by the lens" : `cost of ${of}`,
      points: own.filter((l) => at(l, "of") === of).map((l) => [+at(l, "layer"),
        ...["value", "value_low", "value_high"].map((n) => at(l, n) === "" ? null : +at(l, n)), `n = ${at(l, "questions")}`]) }));
    charts.append(lineChart({ title: `Log-probability of the target by layer, ${condition(+size)}`, x: "layer", y: "nats", series }));
  }
  parts.push(charts);
  for (const name of ["essential layers", "early exit"]) {
    const rows = run.analysis[name];
    if (!rows) continue;
    parts.push(element("h3", {}, name[0].toUpperCase() + name.slice(1)), element("div", { class: "wide" }, element("table", { class: "grid" },
      element("thead", {}, element("tr", {}, ...rows[0].map((n) => element("th", {}, n.replaceAll("_", " "))))),
      element("tbody", {}, ...rows.slice(1).map((line) => element("tr", {}, ...line.map((v) => element("td", {}, v))))))));
  }
  return parts;
}

// Level 3. Only the rows in view are elements.
function questionsLevel(run, show) {
  const columns = [
    ["question", "question", (r) => run.contexts[run.rows.context[r]].question],
    ["text", "", (r) => run.questions[run.contexts[run.rows.context[r]].question]?.question ?? ""],
    ["context", "", (r) => run.contexts[run.rows.context[r]].documents],
    ["gold", "gold position", (r) => run.contexts[run.rows.context[r]].gold],
    ["right", "the model's own prediction is the answer token", (r) => run.rows.correct[r]],
    ["depth", "settle - first correct; - is censored", (r) => run.rows.settle[r] < 0 ? -1 : run.rows.settle[r] - run.rows.first[r]],
    ["first", "first correct layer", (r) => run.rows.first[r]],
    ["settle", "layer from which it stays correct", (r) => run.rows.settle[r]],
    ["flips", "changes of correctness", (r) => run.rows.flips[r]],
    ["rank", "at the output", (r) => run.rank(r, run.n_layers) + 1],
  ];
  const state = { lens: 0, sort: 0, down: false, right: "", gold: "", documents: "", text: "", rows: [] };
  const body = element("div", { class: "rows", role: "rowgroup" });
  const scroll = element("div", { class: "list", role: "table", tabindex: "0", "aria-label": "contexts", onscroll: () => requestAnimationFrame(paint), onkeydown: key }, body);
  const count = element("span", { class: "faint", id: "count", "aria-live": "polite" });
  const heads = element("div", { class: "row heads", role: "row" }, ...columns.map(([name, help], i) => element("button", { type: "button", title: help,
    onclick: () => { state.down = state.sort === i ? !state.down : false; state.sort = i; filter(); } }, name)), element("span", {}, "rank over layers"));
  const chosen = [];

  function filter() {
    state.rows = [];
    for (let row = 0; row < run.n; row++) {
      const c = run.contexts[run.rows.context[row]];
      if (run.rows.token[row] !== 0 || run.rows.lens[row] !== state.lens) continue;
      if (state.right !== "" && String(run.rows.correct[row]) !== state.right) continue;
      if (state.gold !== "" && String(c.gold) !== state.gold) continue;
      if (state.documents !== "" && String(c.documents) !== state.documents) continue;
      if (state.text && !`${c.question} ${run.questions[c.question]?.question ?? ""}`.toLowerCase().includes(state.text)) continue;
      state.rows.push(row);
    }
    const value = columns[state.sort][2], sign = state.down ? -1 : 1;
    const keyed = state.rows.map((row) => [value(row), row]);
    keyed.sort(([a, i], [b, j]) => (a < b ? -sign : a > b ? sign : i - j));
    state.rows = keyed.map(([, row]) => row);
    heads.querySelectorAll("button").forEach((b, i) => b.setAttribute("aria-pressed", String(i === state.sort)));
    body.style.height = `${state.rows.length * ROWS}px`;
    count.textContent = `${state.rows.length} of ${run.contexts.length} contexts`;
    paint();
  }

  function paint() {
    const start = Math.max(0, Math.floor(scroll.scrollTop / ROWS) - 4), shown = state.rows.slice(start, start + STRIP);
    body.replaceChildren(...shown.map((row, i) => {
      const context = run.rows.context[row];
      return element("div", { class: `row ${chosen.includes(context) ? "chosen" : ""}`, role: "row", style: `top:${(start + i) * ROWS}px`, "data-row": row,
        onclick: (event) => choose(context, event.shiftKey) },
        ...columns.map(([name, , value]) => {
          const own = value(row);
          const text = name === "right" ? (own ? "yes" : "no") : name === "gold" && own < 0 || ["depth", "first", "settle", "flips"].includes(name) && own < 0 ? "-"
            : name === "context" ? condition(own) : typeof own === "number" ? own.toLocaleString("en") : own;
          return element("span", { class: name === "text" ? "text" : "number", role: "cell", title: name === "text" ? own : null }, text);
        }), element("i", { class: "strip", style: `background:${strip(row)}` }));
    }));
  }

  // Dark where the target's rank is good, a step a layer.
  function strip(row) {
    const most = Math.log(Math.max(2, run.vocab_size));
    const stops = Array.from({ length: run.layers }, (_, layer) => {
      const v = 1 - Math.log(run.rank(row, layer) + 1) / most, a = 100 * layer / run.layers, b = 100 * (layer + 1) / run.layers;
      return `color-mix(in srgb, rgb(var(--high)) ${(100 * v).toFixed(0)}%, rgb(var(--low))) ${a.toFixed(2)}% ${b.toFixed(2)}%`;
    });
    return `linear-gradient(to right, ${stops.join(",")})`;
  }

  function choose(context, beside) {
    if (!beside) chosen.length = 0;
    if (!chosen.includes(context)) chosen.push(context);
    while (chosen.length > 2) chosen.shift();
    paint();
    show(chosen);
  }

  function key(event) {
    const at = state.rows.findIndex((row) => run.rows.context[row] === chosen.at(-1));
    const next = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: state.rows.length - 1 }[event.key];
    if (next === undefined || !state.rows.length) return;
    event.preventDefault();
    const place = Math.min(state.rows.length - 1, Math.max(0, next));
    choose(run.rows.context[state.rows[place]], event.shiftKey);
    if (place * ROWS < scroll.scrollTop) scroll.scrollTop = place * ROWS;
    else if ((place + 1) * ROWS > scroll.scrollTop + scroll.clientHeight) scroll.scrollTop = (place + 1) * ROWS - scroll.clientHeight;
    paint();
  }

  const values = (name) => [["", "all"], ...[...new Set(run.contexts.map((c) => c[name]))].sort((a, b) => a - b).map((v) => [String(v),
    name === "documents" ? condition(v) : v < 0 ? "none" : String(v)])];
  const bar = element("div", { class: "bar" },
    choice("lens", run.lenses.map((l, i) => [String(i), l]), "0", (v) => { state.lens = +v; filter(); }),
    choice("right", [["", "all"], ["1", "yes"], ["0", "no"]], "", (v) => { state.right = v; filter(); }),
    choice("context", values("documents"), "", (v) => { state.documents = v; filter(); }),
    choice("gold", values("gold"), "", (v) => { state.gold = v; filter(); }),
    element("label", {}, "question", element("input", { type: "search", id: "filter", oninput: (e) => { state.text = e.target.value.toLowerCase(); filter(); } })),
    count);
  filter();
  const best = state.rows.find((row) => run.contexts[run.rows.context[row]].documents > 1) ?? state.rows[0];
  if (best !== undefined) choose(run.rows.context[best], false);
  return section("questions", "Questions", element("p", { class: "faint" }, `The page holds ${run.sample}. Depth, first, settle and flips: rank <= ${run.top}. A row is a context: click to see its tokens below, ` +
    "with Shift beside those of another."), bar, element("div", { class: "wide" }, element("div", { class: "sheet" }, heads, scroll)));
}

// Level 4.
function tokensLevel(run) {
  const beside = element("div", { class: "beside" });
  const show = (contexts) => beside.replaceChildren(...contexts.map((context) => contextView(run, context)));
  return { section: section("tokens", "Tokens", beside), show };
}

function contextView(run, place) {
  const context = run.contexts[place], question = run.questions[context.question];
  const parts = [element("h3", {}, `Question ${context.question}, ${condition(context.documents)}${context.gold < 0 ? "" : `, gold position ${context.gold}`}`)];
  if (question) parts.push(element("p", {}, question.question), element("p", { class: "faint" }, `answers: ${question.answers.join(" | ")}`));
  if (context.generated !== null) parts.push(element("p", {}, "the model writes: ", element("q", {}, context.generated), context.generated_correct ? " (right)" : " (wrong)"));
  if (context.alias_why && run.target === "answer") parts.push(element("p", { class: "faint" }, `target: ${context.alias_why} answer`));
  run.lenses.forEach((lens, number) => {
    const rows = run.byContext[place].filter((row) => run.rows.lens[row] === number);
    if (!rows.length) return;
    const head = element("tr", {}, element("th", {}, "layer"), ...rows.flatMap((row) => [element("th", {}, visible(run.texts[run.rows.target[row]])), element("th", {}, "rank")]));
    const lines = Array.from({ length: run.layers }, (_, i) => run.n_layers - i).map((layer) => element("tr", { class: layer === run.n_layers ? "output" : "" },
      element("td", { class: "number" }, layer === run.n_layers ? "output" : String(layer)), ...rows.flatMap((row) => {
        const rank = run.rank(row, layer) + 1, mark = layer === run.rows.settle[row] ? "settle" : layer === run.rows.first[row] ? "first" : "";
        return [element("td", { class: `best ${rank <= run.top ? "right" : ""} ${mark}` }, visible(run.best(row, layer))), element("td", { class: "number" }, rank.toLocaleString("en"))];
      })));
    parts.push(element("div", { class: "wide" }, element("table", { class: "grid tokens" }, element("caption", {}, `${lens} lens: best token of each layer before each answer token, and the target's rank; bold: rank <= ${run.top}`),
      element("thead", {}, head), element("tbody", {}, ...lines))));
  });
  parts.push(documentsView(run, context, question));
  const at = context.gold < 0 ? "" : ` --gold-position ${context.gold}`;
  parts.push(element("p", { class: "faint" }, "every token of this context: ", element("code", {}, `${run.command} --question ${context.question} --documents ${context.documents}${at} --html context.html`)));
  return element("div", { class: "context" }, ...parts);
}

function documentsView(run, context, question) {
  if (!question) return element("p", { class: "faint" }, run.documents_why || "");
  if (context.documents === 0) return element("p", { class: "faint" }, "closed-book: no document");
  const places = question.distractors.slice(0, context.documents - 1);
  places.splice(context.gold, 0, question.gold);
  return element("details", {}, element("summary", {}, `${places.length} documents`), element("ol", { start: "0", class: "documents" }, ...places.map((place, i) => {
    const [title, text] = run.documents[place];
    return element("li", { class: i === context.gold ? "gold" : "" }, element("b", {}, title), ` ${text}`);
  })));
}

// Runs over the contexts that they share.
function compareLevel(runs) {
  const [a] = runs, parts = [];
  for (const b of runs.slice(1)) {
    const shared = [];
    if (!b.shared) {
      parts.push(element("h3", {}, `${b.name} less ${a.name}`), ...b.compared.map((line) => element("p", {}, line)));
      continue;
    }
    for (const [key, i] of a.places) {
      const j = b.places.get(key);
      const [own, other] = [a.questions[a.contexts[i].question], j === undefined ? null : b.questions[b.contexts[j].question]];
      if (j === undefined || (own && other && own.question !== other.question)) continue;
      const [x, y] = [a.byContext[i], b.byContext[j]].map((rows, r) => rows.find((row) => [a, b][r].rows.token[row] === 0 && [a, b][r].rows.lens[row] === b.lenses[r]));
      if (x !== undefined && y !== undefined) shared.push([i, j, x, y]);
    }
    const depth = (run, row) => run.rows.settle[row] < 0 ? null : run.rows.settle[row] - run.rows.first[row];
    const both = b.compared;
    parts.push(element("h3", {}, `${b.name} less ${a.name}`), ...(both ? both.map((line) => element("p", {}, line)) : []));
    const median = (values) => {
      const s = [...values].sort((p, q) => p - q), half = s.length >> 1;
      return !s.length ? null : s.length % 2 ? s[half] : (s[half - 1] + s[half]) / 2;
    };
    const curve = (run, at) => Array.from({ length: run.layers }, (_, layer) => [layer / run.n_layers, median(shared.map((s) => run.rank(s[at], layer) + 1))]);
    parts.push(element("div", { class: "charts" }, lineChart({ title: `Rank of the target over ${shared.length} shared contexts on this page, median`, x: "share of the layers", y: "rank (1 is best)",
      log: true, upside: true, from: 1, ticks: [0, 0.25, 0.5, 0.75, 1], series: [{ name: a.name, points: curve(a, 2) }, { name: b.name, points: curve(b, 3) }] }),
    b.agreement.length ? lineChart({ title: "Agreement of the order of contexts by rank, Kendall's tau-b", x: "layer", y: "tau-b", from: Math.min(0, ...b.agreement.filter((v) => v !== null)), to: 1,
      series: [{ name: `${a.name} and ${b.name}`, points: b.agreement.map((v, layer) => [layer, v]) }] }) : ""));
    const differs = shared.map(([i, , x, y]) => {
      const [p, q] = [depth(a, x), depth(b, y)], right = b.rows.correct[y] - a.rows.correct[x];
      return { i, right, depth: p === null || q === null ? null : q - p, weight: 100 * Math.abs(right) + Math.abs(p === null || q === null ? 0 : q - p) };
    }).sort((p, q) => q.weight - p.weight).slice(0, 20).filter((d) => d.weight > 0);
    parts.push(element("h3", {}, "Contexts that differ most"), element("div", { class: "wide" }, element("table", { class: "grid" }, element("thead", {}, element("tr", {},
      ...["question", "", "context", "gold", "right", "depth"].map((n) => element("th", {}, n)))), element("tbody", {}, ...differs.map((d) => {
      const c = a.contexts[d.i];
      return element("tr", {}, ...[c.question, a.questions[c.question]?.question ?? "", condition(c.documents), c.gold < 0 ? "-" : c.gold,
        d.right > 0 ? "gained" : d.right < 0 ? "lost" : "same", d.depth === null ? "-" : (d.depth > 0 ? "+" : "") + d.depth].map((v) => element("td", {}, String(v))));
    })))));
  }
  return section("compare", "Runs compared", ...parts);
}
