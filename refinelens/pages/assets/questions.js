// Two levels of the page of a run: every context with its numbers, and the tokens and documents of those chosen.

const ROWS = 28, STRIP = 26; // pixels of a row; rows that are elements at a time
const PRINTED = 200; // rows on paper
const HELP_OF = {
  gold: "gold position", decoy: "position of the first decoy", right: "the model's own prediction is the answer token",
  depth: "settle - first correct; - is censored", first: "first correct layer",
  settle: "layer from which it stays correct", flips: "changes of correctness", rank: "at the output",
};

// Level 3. Only the rows in view are elements.
function questionsLevel(run, show) {
  const { rows, contextOf } = run;
  const columns = { // what a row is sorted by
    question: (r) => contextOf(r).question, text: (r) => run.textOf(contextOf(r)),
    context: (r) => contextOf(r).documents, gold: (r) => contextOf(r).gold,
    ...(run.decoys ? { decoy: (r) => contextOf(r).decoy } : {}), right: (r) => rows.correct[r],
    depth: (r) => run.depth(r) ?? -1, first: (r) => rows.first[r], settle: (r) => rows.settle[r],
    flips: (r) => rows.flips[r], rank: (r) => run.rank(r, run.n_layers) + 1,
  };
  const names = Object.keys(columns);
  const state = { lens: 0, sort: "question", down: false, right: "", gold: "", documents: "", text: "", rows: [] };
  const chosen = [];
  const body = element("div", { class: "rows", role: "rowgroup" });
  const list = element("div", { class: "list", role: "table", tabindex: "0", "aria-label": "contexts",
    onscroll: () => requestAnimationFrame(() => paint()), onkeydown: key }, body);
  const count = element("span", { class: "faint", id: "count", "aria-live": "polite" });
  const heads = element("div", { class: `row heads ${run.decoys ? "wider" : ""}`, role: "row" }, ...names.map((name) =>
    element("button", { type: "button", title: HELP_OF[name], onclick: () => sortBy(name) }, name)),
  element("span", {}, "rank over layers"));

  function sortBy(name) {
    state.down = state.sort === name && !state.down;
    state.sort = name;
    filter();
  }

  function isWanted(row) {
    if (rows.token[row] !== 0 || rows.lens[row] !== state.lens) return false;
    const context = contextOf(row);
    const same = [[state.right, rows.correct[row]], [state.gold, context.gold], [state.documents, context.documents]];
    return same.every(([wanted, own]) => wanted === "" || wanted === String(own)) &&
      `${context.question} ${run.textOf(context)}`.toLowerCase().includes(state.text);
  }

  function filter() {
    const value = columns[state.sort], sign = state.down ? -1 : 1, keyed = [];
    for (let row = 0; row < run.n; row++) if (isWanted(row)) keyed.push([value(row), row]);
    keyed.sort(([a, i], [b, j]) => (a < b ? -sign : a > b ? sign : i - j));
    state.rows = keyed.map(([, row]) => row);
    heads.querySelectorAll("button").forEach((b, i) => b.setAttribute("aria-pressed", String(names[i] === state.sort)));
    body.style.height = `${state.rows.length * ROWS}px`;
    count.textContent = `${state.rows.length} of ${run.contexts.length} contexts`;
    paint();
  }

  function cell(name, row) {
    const own = columns[name](row);
    if (name === "text") return element("span", { class: "text", role: "cell", title: own }, own);
    const shown = name === "right" ? (own ? "yes" : "no") : name === "context" ? condition(own)
      : own < 0 ? "-" : own.toLocaleString("en");
    return element("span", { class: "number", role: "cell" }, shown);
  }

  function paint(start = Math.max(0, Math.floor(list.scrollTop / ROWS) - 4), many = STRIP) {
    body.replaceChildren(...state.rows.slice(start, start + many).map((row, i) => {
      const context = rows.context[row], at = `top:${(start + i) * ROWS}px`;
      const kind = `row ${run.decoys ? "wider" : ""} ${chosen.includes(context) ? "chosen" : ""}`;
      return element("div", { class: kind, role: "row", style: at,
        "data-row": row, onclick: (event) => choose(context, event.shiftKey) },
      ...names.map((name) => cell(name, row)), element("i", { class: "strip", style: `background:${strip(row)}` }));
    }));
  }

  // Dark where the target's rank is good, a step a layer.
  function strip(row) {
    const most = Math.log(Math.max(2, run.vocab_size));
    const stops = Array.from({ length: run.layers }, (_, layer) => {
      const share = 100 * (1 - Math.log(run.rank(row, layer) + 1) / most);
      const [from, to] = [layer, layer + 1].map((edge) => (100 * edge / run.layers).toFixed(2));
      return `color-mix(in srgb, rgb(var(--high)) ${share.toFixed(0)}%, rgb(var(--low))) ${from}% ${to}%`;
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
    const at = state.rows.findIndex((row) => rows.context[row] === chosen.at(-1)), last = state.rows.length - 1;
    const next = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: last }[event.key];
    if (next === undefined || last < 0) return;
    event.preventDefault();
    const place = Math.min(last, Math.max(0, next)), y = place * ROWS;
    choose(rows.context[state.rows[place]], event.shiftKey);
    if (y < list.scrollTop) list.scrollTop = y;
    else if (y + ROWS > list.scrollTop + list.clientHeight) list.scrollTop = y + ROWS - list.clientHeight;
    paint();
  }

  const values = (name, text) => [["", "all"], ...[...new Set(run.contexts.map((c) => c[name]))]
    .sort((a, b) => a - b).map((value) => [String(value), text(value)])];
  const set = (name) => (value) => { state[name] = value; filter(); };
  const bar = element("div", { class: "bar" },
    choice("lens", run.lenses.map((l, i) => [String(i), l]), "0", (v) => set("lens")(+v)),
    choice("right", [["", "all"], ["1", "yes"], ["0", "no"]], "", set("right")),
    choice("context", values("documents", condition), "", set("documents")),
    choice("gold", values("gold", (v) => v < 0 ? "none" : String(v)), "", set("gold")),
    element("label", {}, "question", element("input", { type: "search", id: "filter",
      oninput: (event) => set("text")(event.target.value.toLowerCase()) })), count);
  filter();
  const first = state.rows.find((row) => contextOf(row).documents > 1) ?? state.rows[0];
  if (first !== undefined) choose(rows.context[first], false);
  const cut = element("p", { class: "paper" });
  addEventListener("beforeprint", () => {
    paint(0, PRINTED);
    cut.textContent = (state.rows.length > PRINTED ? `The first ${PRINTED} of ` : "") + count.textContent;
  });
  addEventListener("afterprint", filter);
  const words = `The page holds ${run.sample}. Depth, first, settle and flips: rank <= ${run.top}. A row is a ` +
    "context: click to see its tokens below, with Shift beside those of another.";
  return section("questions", "Questions", element("p", { class: "faint" }, words), bar, cut,
    element("div", { class: "wide" }, element("div", { class: "sheet" }, heads, list)));
}

// Level 4.
function tokensLevel(run) {
  const beside = element("div", { class: "beside" });
  const show = (contexts) => beside.replaceChildren(...contexts.map((place) => contextView(run, place)));
  return { section: section("tokens", "Tokens", beside), show };
}

function contextView(run, place) {
  const context = run.contexts[place], question = run.questions[context.question], parts = [];
  const at = (context.gold < 0 ? "" : `, gold position ${context.gold}`) +
    (context.decoy < 0 ? "" : `, decoy position ${context.decoy}`);
  parts.push(element("h3", {}, `Question ${context.question}, ${condition(context.documents)}${at}`));
  if (question) {
    const other = run.decoys ? `; decoys: ${question.decoy_answer}` : "";
    parts.push(element("p", {}, question.question),
      element("p", { class: "faint" }, `answers: ${question.answers.join(" | ")}${other}`));
  }
  if (context.generated !== null) {
    const verdict = context.generated_correct ? " (right)" : " (wrong)";
    parts.push(element("p", {}, "the model writes: ", element("q", {}, context.generated), verdict));
  }
  if (context.alias_why && run.target === "answer") {
    parts.push(element("p", { class: "faint" }, `target: ${context.alias_why} answer`));
  }
  run.lenses.forEach((lens, number) => {
    const own = run.byContext[place].filter((row) => run.rows.lens[row] === number);
    if (own.length) parts.push(tokensTable(run, lens, own));
  });
  parts.push(...cueCharts(run, place), documentsView(run, context, question));
  const which = `--question ${context.question} --documents ${context.documents}` +
    (context.gold < 0 ? "" : ` --gold-position ${context.gold}`) +
    (context.decoy < 0 ? "" : ` --decoy-position ${context.decoy}`);
  parts.push(element("p", { class: "faint" }, "every token of this context: ",
    element("code", {}, `refinelens read ${run.folder} ${which} --html context.html`)));
  return element("div", { class: "context" }, ...parts);
}

// Layers upwards; of each answer token the best token before it and the target's rank.
function tokensTable(run, lens, own) {
  const layers = Array.from({ length: run.layers }, (_, i) => run.n_layers - i);
  const ranks = layers.map((layer) => own.map((row) => run.rank(row, layer) + 1));
  const names = ["layer", ...own.flatMap((row) => [visible(run.texts[run.rows.target[row]]), "rank"])];
  const lines = layers.map((layer, i) => [layer === run.n_layers ? "output" : layer,
    ...own.flatMap((row, j) => [visible(run.best(row, layer)), ranks[i][j].toLocaleString("en")])]);
  function attributes(i, column) {
    if (column === 0 || column % 2 === 0) return { class: "number" };
    const row = own[(column - 1) / 2], layer = layers[i], right = ranks[i][(column - 1) / 2] <= run.top ? "right" : "";
    const mark = layer === run.rows.settle[row] ? "settle" : layer === run.rows.first[row] ? "first" : "";
    return { class: `best ${right} ${mark}` };
  }
  const table = grid(names, lines, attributes, `${lens} lens: best token of each layer before each answer token, and ` +
    `the target's rank; bold: rank <= ${run.top}`);
  table.classList.add("tokens");
  return table;
}

function documentsView(run, context, question) {
  if (!question) return element("p", { class: "faint" }, run.documents_why || "");
  if (context.documents === 0) return element("p", { class: "faint" }, "closed-book: no document");
  const places = documentsOf(run, context, question);
  const items = places.map(([place, kind]) => {
    const [title, text] = run.documents[place];
    return element("li", { class: kind }, element("b", {}, title), ` ${text}`);
  });
  return element("details", {}, element("summary", {}, `${places.length} documents`),
    element("ol", { start: "0", class: "documents" }, ...items));
}
