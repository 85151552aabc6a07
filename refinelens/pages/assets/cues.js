// Where documents disagree: which of two answers is ahead, by layer, order and distance.

function cuesParts(run) {
  if (!run.cues) return [];
  const charts = element("div", { class: "charts" }), { rows, layers } = run.cues;
  const sizes = [...new Set(layers.map((r) => r.documents))];
  const state = { lens: run.lenses[0], documents: Math.max(...sizes) };
  function draw() {
    const own = layers.filter((r) => r.lens === state.lens && r.documents === state.documents);
    const orders = [...new Set(own.map((r) => r.order))].filter((order) => order !== "either");
    const series = (name) => orders.map((order) => ({ name: order,
      points: own.filter((r) => r.order === order).map((r) => [r.layer, ...r[name]]) }));
    charts.replaceChildren(
      lineChart({ title: "Contexts in which the gold answer is ahead of the decoys', 95 % intervals over questions",
        x: "layer", y: "share", series: series("gold_ahead"), from: 0, to: 1 }),
      lineChart({ title: "Log-probability of the gold answer less that of the decoys', mean", x: "layer", y: "nats",
        series: series("lead") }));
  }
  draw();
  const bar = element("div", { class: "bar" },
    choice("lens", run.lenses.map((l) => [l, l]), state.lens, (v) => { state.lens = v; draw(); }),
    choice("context", sizes.map((s) => [String(s), condition(s)]), String(state.documents),
      (v) => { state.documents = +v; draw(); }));
  const names = ["lens", "context", "order", "distance", "questions", "gold ahead", "gold right", "decoy said",
    "decided at layer", "switched", "loser seen", "gold depth", "decoy depth"];
  const cells = rows.filter((r) => r.top === run.top).map((r) => [r.lens, condition(r.documents), r.order,
    r.distance ?? "all", r.questions, ...["gold_ahead", "gold_correct", "decoy_correct"].map((n) => estimate(r[n], 2)),
    estimate(r.mean_decided, 1), estimate(r.share_switched, 2), estimate(r.share_loser_seen, 2),
    estimate(r.gold_depth, 1), estimate(r.decoy_depth, 1)]);
  return [element("h3", {}, "Two answers"), bar, charts,
    grid(names, cells, (i, column) => ({ class: column > 2 ? "number" : null })),
    element("p", { class: "faint" }, "distance: documents from the one kind to the other, 1 of neighbours. decided: " +
      "the layer from which the answer that is ahead at the output stays ahead. switched: the lead changes after the " +
      `first layer at which either is of rank <= ${run.top}. loser seen: the answer that is behind at the output is ` +
      "of that rank at some layer.")];
}

// Ranks of both answers at the token before the first answer token of a context, lens by lens.
function cueCharts(run, place) {
  if (!run.rows.decoy_rank) return [];
  const charts = run.byContext[place].filter((row) => run.rows.token[row] === 0).map((row) => {
    const ranks = (name) => Array.from({ length: run.layers }, (_, l) => [l, run.rows[name][row * run.layers + l] + 1]);
    const series = [{ name: "gold answer", points: ranks("rank") },
      { name: "decoys' answer", points: ranks("decoy_rank") }];
    return lineChart({ title: `Rank of both answers, ${run.lenses[run.rows.lens[row]]} lens`, x: "layer",
      y: "rank (1 is best)", log: true, upside: true, from: 1, series });
  });
  return [element("div", { class: "charts" }, ...charts)];
}

// Documents of a context in their order, each with its kind.
function documentsOf(run, context, question) {
  const golds = context.documents > 1 ? run.golds : 1, decoys = context.decoy < 0 ? 0 : run.decoys;
  const places = question.distractors.slice(0, context.documents - golds - decoys).map((place) => [place, ""]);
  const blocks = [[context.gold, question.golds.slice(0, golds), "gold"],
    [context.decoy, question.decoys.slice(0, decoys), "decoy"]];
  for (const [first, own, kind] of blocks.filter(([, own]) => own.length).sort(([a], [b]) => a - b)) {
    places.splice(first, 0, ...own.map((place) => [place, kind]));
  }
  return places;
}
