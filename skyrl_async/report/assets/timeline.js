// A few seconds of the run's timeline: one row for each lane, and where policy versions went.
const LANE = 22, GAP = 4, NAMES = 150;

function timelinePanel(timeline) {
  const width = 1200, height = timeline.lanes.length * (LANE + GAP) + 26;
  const colors = spanColors(timeline.lanes);
  const x = (s) => NAMES + ((width - NAMES) * s) / timeline.seconds;
  const top = (i) => i * (LANE + GAP);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "timeline" });
  for (const tick of ticks(0, timeline.seconds, 8)) {
    picture.append(svg("line", { class: "grid-line", x1: x(tick), x2: x(tick), y1: 0, y2: height - 22 }),
      svg("text", { x: x(tick), y: height - 6, "text-anchor": "middle" }, clock(timeline.start_s + tick)));
  }
  timeline.lanes.forEach((lane, i) => {
    picture.append(svg("text", { x: NAMES - 8, y: top(i) + 15, "text-anchor": "end" }, laneName(lane)));
    for (const span of lane.spans) picture.append(spanNode(span, lane, colors, x, top(i)));
  });
  picture.append(...flowNodes(timeline.flows, x, top));
  const wide = el("div", { class: "scroll" }, el("div", { class: "timeline" }, picture));
  const note = timeline.left_out
    ? `${timeline.left_out} more lanes are left out; python -m skyrl_async.timeline shows all, and the whole run.`
    : "python -m skyrl_async.timeline shows the whole run.";
  return el("section", { class: "card wide" }, wide,
    el("div", { class: "legend" }, ...[...colors].map(([name, color]) =>
      el("span", null, el("span", { class: "swatch", style: { background: color } }), name.replaceAll("_", " "))),
    el("span", null, "↘ a policy version, from the learner to an engine")),
    el("p", { class: "muted" }, note));
}

function laneName(lane) {
  const name = lane.name === lane.role || lane.name === lane.process ? lane.process : `${lane.process} ${lane.name}`;
  const short = name.replace("rollout actor", "actor");
  return short.length > 25 ? short.slice(0, 24) + "…" : short;
}

// Of the spans that every run has, so that they look alike in all reports.
const SPAN_COLORS = { generate: 0, environment: 2, other: 7, decode: 1, swap: 5, load: 3, transfer: 6,
  prepare: 4, proximal: 7, train: 2, forward: 6, backward: 3, step: 5, snapshot: 1, checkpoint: 0 };

// Names of work get colors; waiting, and what only holds other spans, is gray.
function spanColors(lanes) {
  const seconds = new Map(), waits = new Set();
  for (const lane of lanes) {
    for (const [name, begin, end, , waiting] of lane.spans) {
      seconds.set(name, (seconds.get(name) || 0) + end - begin);
      if (waiting) waits.add(name);
    }
  }
  const names = [...seconds.keys()].sort((a, b) => seconds.get(b) - seconds.get(a));
  let idle = 0;
  return new Map(names.map((name) => [name, waits.has(name)
    ? `var(--w${idle++ % 4})` : PALETTE[SPAN_COLORS[name]] || "var(--ink3)"]));
}

function spanNode([name, begin, end, depth, , words], lane, colors, x, top) {
  const inset = Math.min(depth, 3) * 3;
  const node = svg("rect", { x: x(begin), y: top + inset, width: Math.max(x(end) - x(begin), 0.6),
    height: LANE - 2 * inset, fill: colors.get(name), rx: 1.5, stroke: "var(--card)", "stroke-width": depth ? 0.6 : 0 });
  hoverTip(node, `${lane.process}: ${name.replaceAll("_", " ")}`, [
    [null, "time", quantity(end - begin, "s")], ...(words ? [[null, words, ""]] : [])]);
  return node;
}

function flowNodes(flows, x, top) {
  const made = new Map(flows.filter((f) => f[1] === "made").map((f) => [f[0], f]));
  return flows.filter((f) => f[1] === "loaded" && made.has(f[0])).flatMap(([version, , lane, second]) => {
    const from = made.get(version), x1 = x(from[3]), x2 = x(second);
    const y1 = top(from[2]) + LANE / 2, y2 = top(lane) + (lane > from[2] ? 2 : LANE - 2);
    const line = svg("path", { d: `M${x1} ${y1}L${x2} ${y2}`, stroke: "var(--ink)", "stroke-width": 1.1, fill: "none" });
    const dot = svg("circle", { cx: x2, cy: y2, r: 2.6, fill: "var(--ink)" });
    const text = svg("text", { x: x2 + 4, y: y2 - 3, class: "halo" }, `v${version}`);
    return [line, dot, text];
  });
}
