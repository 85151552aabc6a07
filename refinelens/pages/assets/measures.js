// What a run was asked to measure beside ranks: settling, frequency of predicted tokens, a probe of the gold position.

const MEASURED = {
  jsd: { title: "Jensen-Shannon divergence from the output, mean", y: "nats", from: 0 },
  top5: { title: "Five likeliest tokens that are the output's, mean", y: "share", from: 0, to: 1 },
  attn_logit: { title: "What attention adds to the target's logit (layer 0: the embedding), mean", y: "nats" },
  mlp_logit: { title: "What the feed-forward part adds to the target's logit, mean", y: "nats" },
  attn_cosine: { title: "Cosine of what attention adds and the stream before it, mean", y: "cosine" },
  mlp_cosine: { title: "Cosine of what the feed-forward part adds and the stream before it, mean", y: "cosine" },
  block_cosine: { title: "Cosine of what the block adds and the stream before it, mean", y: "cosine" },
  attn_size: { title: "Norm of what attention adds / of the stream before it, mean", y: "share", from: 0 },
  mlp_size: { title: "Norm of what the feed-forward part adds / of the stream before it, mean", y: "share", from: 0 },
  mid_logprob: { title: "Log-probability of the target behind attention, plain lens, mean", y: "nats" },
};

// Of a lens and a context size: how frequent best tokens are, and how many of them give way, a line per bucket.
function frequencyCharts(run, lens, documents) {
  const own = run.frequency.filter((c) => c.lens === lens && c.documents === documents);
  if (!own.length) return [];
  const colours = ramp(own.length);
  const series = (name) => own.map((curve, i) => ({ colour: colours[i],
    name: curve.bucket === "rest" ? "rarer ones" : `frequency rank ${curve.bucket}`,
    points: curve[name].map((value, layer) => [layer, ...value]) }));
  return [["share", "Best tokens by how frequent they are"], ["flipped", "Best tokens that are not the output's"]]
    .map(([name, title]) => lineChart({ title, x: "layer", y: "share", series: series(name), from: 0, to: 1 }));
}

// Where predictions settle by their divergence from the output.
function settlingParts(run) {
  if (!run.settling.length) return [];
  const rows = run.settling.map((r) => [r.lens, condition(r.documents), r.gold_position < 0 ? "-" : r.gold_position,
    r.questions, estimate(r.mean_settle_jsd, 1), estimate(r.deep_thinking, 2),
    estimate(r.deep_thinking_generated, 2)]);
  return [element("h3", {}, "Settling by divergence"),
    grid(["lens", "context", "gold", "questions", "settles at layer", "share that settles late",
      "of generated tokens"], rows, (i, column) => ({ class: column > 1 ? "number" : null }))];
}

// By layer how often a linear probe finds the gold position, and how often the lens is right.
function probeParts(run) {
  if (!run.probe.length) return [];
  const charts = groupsOf(run.probe, (row) => row.documents).map((rows) => {
    const [row] = rows, points = (name) => rows.map((r) => [r.layer, ...r[name], `n = ${r.questions}`]);
    const series = [{ name: "gold position, by the probe", points: points("accuracy") },
      { name: `answer, by lens ${run.lenses[0]}`, points: points("lens_accuracy") },
      { name: "chance of the probe", points: rows.map((r) => [r.layer, r.chance]) }];
    const title = `Gold position found in the state, answer read from it, ${condition(row.documents)}`;
    return lineChart({ title, x: "layer", y: "share right", series, from: 0, to: 1 });
  });
  return [element("h3", {}, "Probe of the gold position"), element("div", { class: "charts" }, ...charts)];
}

// Up to which layer the model works on its prediction, by method.
function effectiveParts(run) {
  if (!run.effective.length) return [];
  const rows = run.effective.map((r) => [r.lens, condition(r.documents),
    r.gold_position === null ? "all" : r.gold_position < 0 ? "-" : r.gold_position, r.method, r.questions,
    estimate(r.layer, 1), estimate(r.ratio, 2)]);
  return [element("h3", {}, "Effective depth"),
    grid(["lens", "context", "gold", "method", "questions", "layer", "share of the layers"], rows,
      (i, column) => ({ class: column > 3 || column === 2 ? "number" : null }))];
}
