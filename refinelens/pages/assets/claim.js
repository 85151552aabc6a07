// The verdict on a claim: what was asked, the rule, the differences, and every other reading of the sentence.

function claimLevel(claim) {
  const upper = (text) => text[0].toUpperCase() + text.slice(1);
  const unit = claim.unit;
  const number = (value, digits = 2) => value === null ? "-" : value.toFixed(digits);
  const withInterval = ({ value, low, high }) => estimate([value, low, high], 2);
  const p = (value) => value === null ? "-" : value < 0.001 ? value.toExponential(0) : value.toFixed(3);
  const sides = claim.sides.map((s) => [s.name, s.questions, withInterval(s.difference), p(s.p), p(s.p_opposite),
    number(s.detectable)]);
  const rule = Object.entries(claim.rule).map(([name, value]) => `${name} ${value}`).join(", ");
  const reading = Object.entries(claim.reading).map(([name, value]) => `${name} ${value}`).join(", ");
  const parts = [element("p", { class: "claim" }, claim.claim), element("p", { class: "faint" }, claim.source),
    element("p", { class: "verdict", id: "verdict" }, upper(claim.verdict)),
    element("p", {}, `${upper(claim.reason)}.`), element("p", {}, claim.note)];
  const charts = [];
  if (claim.positions.length > 1) {
    const points = claim.positions.map((c) => [c.gold_position, c.value, c.low, c.high, `n = ${c.questions}`]);
    const title = `${upper(claim.reading.statistic.replaceAll("_", " "))} by gold position, primary reading`;
    const series = [{ name: claim.reading.lens, points: points.filter((c) => c[1] !== null) }];
    charts.push(lineChart({ title, x: "gold position", y: unit, series }));
  }
  if (claim.secondary.length) charts.push(readingsChart(claim, unit));
  parts.push(element("div", { class: "charts" }, ...charts));
  if (sides.length) {
    parts.push(grid(["difference", "questions", "mean, 95 % interval", "p (above 0)", "p (below margin)",
      "smallest with 80 % power"], sides, (i, column) => ({ class: column ? "number" : null })));
  }
  parts.push(element("p", { class: "faint" }, `Primary analysis, fixed ${claim.fixed}: ${claim.analysis}; ` +
    `${reading}. Rule: ${rule}. ${claim.questions_asked} questions were drawn` +
    Object.entries(claim.left_out).map(([why, n]) => `; ${n} left out, ${why}`).join("") + "."));
  if (claim.secondary.length) parts.push(readingsTable(claim, withInterval, p));
  return section("claim", "Claim", ...parts);
}

// Every reading in the order of its smallest difference, those that support the claim after correction apart.
function readingsChart(claim, unit) {
  const sorted = claim.secondary.filter((r) => r.estimate.value !== null)
    .sort((a, b) => a.estimate.value - b.estimate.value);
  const points = (wanted) => sorted.map((r, i) => [i + 1, r, r.supported]).filter(([, , s]) => s === wanted)
    .map(([i, r]) => [i, r.estimate.value, r.estimate.low, r.estimate.high, nameOf(claim, r)]);
  const series = [{ name: "does not support the claim", points: points(false) },
    { name: "supports it after correction", points: points(true) }].filter((s) => s.points.length);
  return lineChart({ title: "Every other reading: the smallest of its differences", x: "reading", y: unit, series,
    dots: true });
}

// What sets a reading apart from the primary one.
function nameOf(claim, reading) {
  return Object.entries(claim.reading).filter(([name]) => reading[name] !== claim.reading[name])
    .map(([name]) => `${name} ${reading[name]}`).join(", ");
}

function readingsTable(claim, withInterval, p) {
  const varied = Object.keys(claim.reading).filter((name) => new Set(claim.secondary.map((r) => r[name])).size > 1);
  const rows = claim.secondary.map((r) => [...varied.map((name) => r[name]), r.n, withInterval(r.estimate), p(r.p),
    p(r.p_holm), r.supported ? "yes" : "no"]);
  const names = [...varied, "questions", "smallest difference", "p", "p after Holm", "supports"];
  return element("details", {}, element("summary", {}, `${rows.length} other readings`),
    grid(names, rows, (i, column) => ({ class: column >= varied.length ? "number" : null })));
}
