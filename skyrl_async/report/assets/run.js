// The page of a run, panel by panel; a panel is drawn again only when what it shows has changed.
const RANK = ["Learning", "Fine-tuning", "Staleness", "How far the data is from the policy",
  "Throughput", "Where the time goes", "Timeline", "Sample trajectories", "Dropped groups",
  "Collapse guard", "Checkpoints", "Publishing weights", "Replay buffer", "Configuration",
  "Everything else"];
const drawn = new Map();
const sections = new Map();

function drawRun(page, content) {
  document.title = `${content.name}: ${content.status}`;
  if (!page.dataset.built) buildFrame(page);
  panel("top", [content.name, content.folder, content.status, content.error, content.subtitle,
    content.tiles, content.waste], () => drawTop(content));
  panel("charts", content.charts, () => buildCharts(content.charts));
  panel("staleness", content.staleness.labels, () => buildStaleness(content.staleness));
  panel("histogram", [content.staleness.labels, content.staleness.tokens], () => drawHistogram(content.staleness));
  stalenessNow = content.staleness;
  panel("idle", content.idle.map((role) => role.parts.map((part) => part.name)), () => buildIdle(content.idle));
  panel("idle totals", content.idle, () => drawIdleTotals(content.idle));
  panel("timeline", content.timeline, () => fillSection("Timeline", content.timeline
    ? [timelinePanel(content.timeline)] : []));
  panel("samples", content.samples, () => fillSection("Sample trajectories",
    (content.samples || []).length ? [samplesPanel(content.samples)] : []));
  panel("dropped", content.dropped, () => drawDropped(content.dropped));
  panel("guard", content.guard, () => drawGuard(content.guard));
  panel("checkpoints", content.checkpoints, () => drawCheckpoints(content.checkpoints));
  panel("config", content.config, () => drawConfig(content.config || []));
  for (const chart of shared.charts) if (chart.node.isConnected && isOpen(chart.node)) chart.redraw();
  panel("nav", [...sections].map(([title, s]) => [title, s.hidden]), drawNav);
}

function isOpen(node) {
  const box = node.closest("details");
  return !box || box.open;
}

function panel(name, value, draw) {
  const now = JSON.stringify(value ?? null);
  if (drawn.get(name) === now) return;
  drawn.set(name, now);
  draw();
}

function buildFrame(page) {
  page.dataset.built = "1";
  page.replaceChildren(el("div", { id: "top" }), el("nav"));
  for (const title of RANK) {
    const grid = el("div", { class: "grid" });
    const late = title === "Everything else";
    const node = late
      ? el("details", { id: anchor(title), ontoggle: redrawAll }, el("summary", null, title), grid)
      : el("section", { id: anchor(title) }, el("h2", null, title), grid);
    node.hidden = true;
    sections.set(title, node);
    page.append(node);
  }
}

function anchor(title) {
  return title.toLowerCase().replaceAll(" ", "-");
}

function fillSection(title, nodes, hint) {
  const node = sections.get(title), grid = node.querySelector(".grid");
  node.hidden = !nodes.length;
  node.querySelector(".hint")?.remove();
  if (hint) grid.before(el("p", { class: "hint" }, hint));
  nodes.forEach((child) => { if (!child.matches(".card:not(.wide)")) child.classList.add("wide"); });
  grid.replaceChildren(...nodes);
}

function drawTop(content) {
  const tone = { finished: "good", failed: "bad" }[content.status] || "warn";
  document.getElementById("top").replaceChildren(
    el("div", null, el("h1", null, content.name),
      el("span", { class: `status ${tone}`, id: "status" }, content.status),
      el("span", { id: "stale" }, "")),
    el("p", { class: "muted" }, content.subtitle + (content.subtitle ? " · " : ""),
      el("code", null, content.folder)),
    content.error ? el("p", { class: "error" }, content.error) : "",
    el("div", { class: "tiles" }, ...content.tiles.map((tile) =>
      el("div", { class: tile.good ? "tile" : "tile bad" }, el("div", { class: "label" }, tile.label),
        el("div", { class: "value" }, tile.value), el("div", { class: "note" }, tile.note)))),
    content.waste ? el("div", { class: "tile waste" }, el("b", null, "Largest waste: "), content.waste.text) : "");
}

function drawNav() {
  const toggle = ["step", "time_s"].map((x) => el("button", {
    "aria-pressed": String(shared.x === x),
    onclick: () => { shared.x = x; drawNav(); redrawAll(); },
  }, x === "step" ? "steps" : "seconds"));
  document.querySelector("nav").replaceChildren(
    ...[...sections].filter(([, node]) => !node.hidden).map(([title, node]) =>
      el("a", { href: "#" + node.id }, title)),
    el("span", { class: "grow" }), ...toggle);
}

function redrawAll() {
  for (const chart of shared.charts) if (chart.node.isConnected && isOpen(chart.node)) chart.redraw();
}

const lineCharts = [], stalenessCharts = [], idleCharts = [];

function replaceCharts(list, made) {
  list.forEach((chart) => shared.charts.delete(chart));
  list.splice(0, list.length, ...made);
}

function buildCharts(specs) {
  const by = new Map();
  replaceCharts(lineCharts, specs.map((spec) => {
    const chart = lineChart(spec);
    by.set(spec.section, [...(by.get(spec.section) || []), chart.node]);
    return chart;
  }));
  for (const title of RANK) {
    if (title !== "Staleness" && by.has(title)) fillSection(title, by.get(title));
  }
  stalenessLines = by.get("Staleness") || [];
  arrangeStaleness();
}

let stalenessNow = null, stalenessLines = [], stalenessBars = null, stalenessShares = null;

function buildStaleness(staleness) {
  stalenessNow = staleness;
  const chart = shareChart("trained tokens by staleness, over time", () =>
    stalenessNow.labels.map((label, i) => ({
      label: `${label} old`, color: shade(i, stalenessNow.labels.length),
      values: stalenessNow.shares.map((shares) => shares[i]),
    })));
  replaceCharts(stalenessCharts, [chart]);
  stalenessShares = chart.node;
  arrangeStaleness();
}

function shade(i, count) {
  if (count <= 5) return `var(--s${i})`;
  const at = (4 * i) / (count - 1), low = Math.floor(at);
  return `color-mix(in srgb, var(--s${Math.min(4, low + 1)}) ${Math.round(100 * (at - low))}%, var(--s${low}))`;
}

function drawHistogram(staleness) {
  stalenessBars = staleness.tokens.length
    ? barChart("trained tokens by staleness, whole run", "versions old", staleness.labels, staleness.tokens) : null;
  arrangeStaleness();
}

function arrangeStaleness() {
  const first = stalenessBars ? [stalenessBars, stalenessShares] : [];
  fillSection("Staleness", [...first, ...stalenessLines].filter(Boolean),
    "Policy version at the start of the step that trains a token, minus the version that sampled it.");
}

function partColors(parts) {
  let work = 0, waste = 0;
  return parts.map((part) => (part.waste ? `var(--w${waste++ % 4})` : PALETTE[work++ % PALETTE.length]));
}

function buildIdle(roles) {
  replaceCharts(idleCharts, roles.map((role) => {
    const colors = partColors(role.parts);
    const chart = shareChart(role.role, () => role.parts.map((part, i) => ({
      label: part.part.replaceAll("_", " "), color: colors[i],
      values: (column(part.name) || { mean: [] }).mean,
    })));
    chart.totals = el("div", { class: "totals" });
    chart.node.querySelector("header").append(el("span", { class: "unit" }, role.meaning));
    chart.node.insertBefore(chart.totals, chart.picture);
    return chart;
  }));
  fillSection("Where the time goes", idleCharts.map((chart) => chart.node),
    "Colored parts are work, gray ones are waiting. The bar is the whole run.");
}

function drawIdleTotals(roles) {
  roles.forEach((role, k) => {
    const colors = partColors(role.parts), width = 400;
    let x = 0;
    const nodes = role.parts.map((part, i) => {
      const node = svg("rect", { x: x * width, y: 0, width: part.share * width, height: 14, fill: colors[i] });
      hoverTip(node, role.role, [[colors[i], part.part.replaceAll("_", " "), quantity(part.share, "fraction")]]);
      x += part.share;
      return node;
    });
    idleCharts[k].totals.replaceChildren(
      svg("svg", { viewBox: `0 0 ${width} 14`, height: 14, preserveAspectRatio: "none", role: "img",
        "aria-label": `${role.role}: shares of the whole run` }, ...nodes),
      el("div", { class: "legend" }, ...role.parts.map((part, i) => [part, colors[i]])
        .filter(([part]) => part.share >= 0.005).map(([part, color]) =>
          el("span", null, el("span", { class: "swatch", style: { background: color } }),
            `${part.part.replaceAll("_", " ")} ${quantity(part.share, "fraction")}`))));
  });
}
